"""Measures decoding steps on a GPU: captured in a CUDA graph, replayed, timed by events; nothing runs in between."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from angelforge.tools.device_step.executor import Call
from angelforge.tools.device_step.model import DeviceModel
from angelforge.tools.device_step.sequences import Case
from angelforge.tools.kernel_bench.capture import capture
from angelforge.tools.kernel_bench.failures import LAUNCH_ERRORS, reason
from angelforge.tools.kernel_bench.statistics import Timing, summarise
from angelforge.tools.kernel_bench.timing import STEP_WARM, spans, time_calls, warm_up

GROUP = 8  # replays between two events: what the host needs to launch one is then no part of the time


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
    trouble: str = ""  # why there are no operators, though they were asked for


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
    """Runs a step from Python, captures it, and times `rounds` groups of replays of a GPU that is at its clocks.

    The memory that this took is given back.

    Raises:
        torch.cuda.OutOfMemoryError: memory does not suffice.
        LAUNCH_ERRORS: a kernel cannot be launched or captured.
    """
    values = model.values(case)
    first = first_run(model, values, model.subject.by_operator)
    logits, experts, calls = first.logits.clone(), first.experts, first.calls
    del first
    graph, captured = capture(partial(model.graph.run, values))
    warm_up(graph.replay, STEP_WARM)
    graph.replay()
    same, finite = torch.equal(captured, logits), bool(captured.isfinite().all())
    timing = summarise(spans(graph.replay, rounds, GROUP))
    host = logits.cpu()
    del captured, graph, logits
    operators, trouble = _try_operators(calls)
    return Figures(case, timing, experts, finite, same, operators, logits=host, trouble=trouble)


def _try_operators(calls: Sequence[Call]) -> tuple[tuple[OperatorTime, ...], str]:
    """(each operator's time, why there is none): the whole step's figures stand in any case."""
    try:
        return _by_operator(calls), ""
    except LAUNCH_ERRORS as error:
        return (), reason(error)


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
