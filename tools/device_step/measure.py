"""Measures decoding steps on a GPU: captured in a CUDA graph, replayed, timed by events; nothing runs in between."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from angelforge.tools.device_step.executor import Call
from angelforge.tools.device_step.model import DeviceModel
from angelforge.tools.device_step.sequences import Case
from angelforge.tools.kernel_bench.statistics import Timing, summarise
from angelforge.tools.kernel_bench.timing import time_calls

WARM = 3  # replays before those that count


@dataclass(frozen=True)
class OperatorTime:
    """All calls of one operator in a step."""

    operator: str
    calls: int
    microseconds: float  # together, each as long as in a row of its own kind


@dataclass(frozen=True)
class Figures:
    """What was seen of one case."""

    case: Case
    timing: Timing  # µs of a step
    experts: tuple[int, ...]  # different routed experts that each MoE layer's tokens took
    finite: bool  # every logit
    repeatable: bool  # the captured step gives the bits of the one that was launched from Python
    operators: tuple[OperatorTime, ...] = ()  # heaviest first; empty where they were not asked for
    through: str = "kernels"  # what launched the step
    logits: Any = field(default=None, repr=False, compare=False)  # torch.Tensor f32 [R, vocab] on the host
    cosine: float | None = None  # of the logits with those of the kernels launched in order


@dataclass(frozen=True, eq=False)
class FirstRun:
    """What a step that is launched from Python tells."""

    logits: torch.Tensor  # f32 [R, vocab]
    experts: tuple[int, ...]
    calls: tuple[Call, ...]  # all of them where they were to be kept


def first_run(model: DeviceModel, values: dict[str, torch.Tensor], keep: bool) -> FirstRun:
    """One step, node by node; on a GPU it compiles and loads whatever a capture may not."""
    experts: list[int] = []
    kept: list[Call] = []
    for call in model.graph.walk(values):
        if call.operator == "MoERoute":
            ids = call.outputs[0]
            routed = ids[(ids >= 0) & (ids < model.subject.config.num_experts)]
            experts.append(int(routed.unique().numel()))
        if keep:
            kept.append(call)
        logits = call.outputs[0]
    return FirstRun(logits, tuple(experts), tuple(kept))


def measure_case(model: DeviceModel, case: Case, rounds: int) -> Figures:
    """Runs a step from Python, captures it, and times `rounds` replays. The memory that this took is given back."""
    values = model.values(case)
    first = first_run(model, values, model.subject.by_operator)
    operators = _by_operator(first.calls)
    logits, experts = first.logits.clone(), first.experts
    del first
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model.graph.run(values)
    for _ in range(WARM):
        graph.replay()
    torch.cuda.synchronize()
    same, finite = torch.equal(captured, logits), bool(captured.isfinite().all())
    timing = summarise([elapsed(graph.replay) for _ in range(rounds)])
    host = logits.cpu()
    del captured, graph, values, logits
    torch.cuda.empty_cache()
    return Figures(case, timing, experts, finite, same, operators, logits=host)


def elapsed(work: Callable[[], None]) -> float:
    """µs on the GPU of what `work` puts on torch's current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return 1000.0 * float(start.elapsed_time(end))


def _by_operator(calls: Sequence[Call]) -> tuple[OperatorTime, ...]:
    """Every operator's calls of a step one after another in a CUDA graph of their own: layers have other weights."""
    groups: dict[str, list[Call]] = {}
    for call in calls:
        groups.setdefault(call.operator, []).append(call)
    found = [_time_operator(name, group) for name, group in groups.items()]
    return tuple(sorted((item for item in found if item.calls), key=lambda item: -item.microseconds))


def _time_operator(name: str, group: Sequence[Call]) -> OperatorTime:
    launches = [call.launch for call in group if call.launch is not None]
    return OperatorTime(name, len(launches), len(launches) * time_calls(launches).median if launches else 0.0)
