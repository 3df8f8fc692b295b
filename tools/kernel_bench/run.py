"""One run on the GPU: numerics of everything first, then times, the heaviest calls first, within a time limit."""

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from time import monotonic
from typing import TypeVar

import torch

from angelforge.config import ModelConfig
from angelforge.errors import AngelForgeError
from angelforge.exporter.synthetic_config import FULL_CONFIG
from angelforge.plugins.kernel import Gpu, Tile
from angelforge.plugins.tensorrt.gpu import GpuFacts
from angelforge.tools.kernel_bench.checks import check_against_body, check_works, has_kernel
from angelforge.tools.kernel_bench.execution import execute
from angelforge.tools.kernel_bench.failures import LAUNCH_ERRORS, answers, reason
from angelforge.tools.kernel_bench.goals import target_of
from angelforge.tools.kernel_bench.measure import Machine, Measurement, default_tile, measure
from angelforge.tools.kernel_bench.report import Report
from angelforge.tools.kernel_bench.rivals.beside import Rivals
from angelforge.tools.kernel_bench.rivals.comparison import Comparison
from angelforge.tools.kernel_bench.timing import achievable_bandwidth
from angelforge.tools.kernel_bench.warm import compile_tiles
from angelforge.tools.kernel_bench.work import Work, works

Say = Callable[[str], None]
Result = TypeVar("Result")
ROUTE_TOKENS = 64  # routing's second goal


class Deadline:
    """A time limit from now on."""

    def __init__(self, seconds: float) -> None:
        self.end = monotonic() + seconds

    def over(self) -> bool:
        """Whether it has passed."""
        return monotonic() > self.end


def full_config() -> ModelConfig:
    """AntAngelMed's."""
    return ModelConfig.from_dict(FULL_CONFIG)


def all_works(config: ModelConfig, operators: Sequence[str] = ()) -> list[Work]:
    """What a run measures; of these operators, or of all that have a kernel."""
    found = [*works(config), *(w for w in works(config, (ROUTE_TOKENS,), ()) if w.operator.name == "MoERoute")]
    return [w for w in found if has_kernel(w.operator) and (not operators or w.operator.name in operators)]


def find_machine(facts: GpuFacts) -> Machine:
    """The GPU, with its achievable bandwidth measured now.

    Raises:
        AngelForgeError: it is not the GPU that torch uses, or a kernel cannot be launched at all.
    """
    name = torch.cuda.get_device_name()
    if name != facts.name:
        raise AngelForgeError(
            f"The driver's first GPU is {facts.name}, but torch uses {name}; set CUDA_VISIBLE_DEVICES."
        )
    gpu = Gpu(facts.architecture, facts.sms)
    try:
        achievable = achievable_bandwidth(facts.sms)
    except LAUNCH_ERRORS as error:  # Triton's first launch of the process
        raise AngelForgeError(
            f"Not even a kernel that only reads memory can be launched: {reason(error)}. Triton needs a C compiler, "
            "Python's headers (Python.h) and a cache folder that can be written; see angelforge doctor."
        ) from error
    return Machine(name, gpu, target_of(name, facts.memory_bytes), achievable)


def run(
    machine: Machine,
    operators: Sequence[str],
    deadline: Deadline,
    seed: int,
    say: Say,
    save: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Checks and measures everything that there is time for; `save` is given what is known after each call."""
    chosen, gpu = all_works(full_config(), operators), machine.gpu
    checks = list(check_works(gpu, operators))
    trouble = Trouble([], [], machine.device)
    tiles = _compile_all([*checks, *((work, default_tile(work, gpu)) for work in chosen)], gpu, trouble, say)
    verdicts = []
    say(f"Comparing {len(checks)} tiles with function bodies …")
    run_here = partial(execute, gpu=gpu)
    for work, tile in checks:
        if _key(work, tile) in tiles:
            attempt = partial(check_against_body, work, tile, run_here, seed, machine.device)
            verdicts += trouble.attempt(work, deadline, attempt)
    measurements: list[Measurement] = []
    compared = set()
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    report = Report(machine, versions(), date, verdicts, measurements, trouble.skipped, trouble.failed)
    for work in chosen:
        key = _key(work, default_tile(work, gpu))
        if key in tiles:
            attempt_one = partial(measure, work, machine, seed, check_ptx=key not in compared)
            for found in trouble.attempt(work, deadline, attempt_one):
                measurements.append(found)
                compared.add(key)
                say(f"{work.name}: {found.timing.median:.1f} µs")
                save(report)
    return report


def compare_engines(
    measurements: Sequence[Measurement],
    machine: Machine,
    deadline: Deadline,
    seed: int,
    say: Say,
    save: Callable[[Comparison], None],
) -> Comparison:
    """Other engines' kernels at the calls that were measured; `save` is given all rows after each call.

    What they print goes to standard error.
    """
    with redirect_stdout(sys.stderr):
        rivals = Rivals()
        say(f"Other engines' kernels: {', '.join(rivals.versions) or 'none is installed'} …")
        return rivals.all_beside(measurements, machine, deadline.over, seed, say, save)


def _key(work: Work, tile: Tile) -> tuple[object, ...]:
    return work.operator.name, tuple(sorted(work.sizes().items())), tile


def _compile_all(pairs: Sequence[tuple[Work, Tile]], gpu: Gpu, trouble: "Trouble", say: Say) -> set[tuple[object, ...]]:
    """Keys of the tiles that could be compiled."""
    jobs = {_key(work, tile): (work, tile) for work, tile in pairs}
    say(f"Compiling {len(jobs)} tiles …")
    codes = compile_tiles(jobs.values(), gpu.architecture)
    for (work, tile), code in zip(jobs.values(), codes, strict=True):
        if code.problem:
            trouble.failed.append(f"{work.name}, {tile} cannot be compiled: {code.problem}")
    return {key for key, code in zip(jobs, codes, strict=True) if not code.problem}


@dataclass
class Trouble:
    """What a run leaves out, and why: one kernel's failure does not end it, a lost GPU does."""

    skipped: list[str]  # no time, too little memory, or after the GPU was lost
    failed: list[str]
    device: str = "cuda"
    lost: bool = False

    def attempt(self, work: Work, deadline: Deadline, function: Callable[[], Result]) -> list[Result]:
        """The result in a list; an empty list where there is none."""
        if self.lost or deadline.over():
            self.skipped.append(work.name)
            return []
        try:
            return [function()]
        except torch.cuda.OutOfMemoryError:
            self.skipped.append(f"{work.name} (too little GPU memory)")
        except LAUNCH_ERRORS as error:
            self.failed.append(f"{work.name}: {reason(error)}")
        if not answers(self.device):
            self.failed.append(f"the GPU does not answer after {work.name}; the run ends here")
            self.lost = True
        return []


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {}
    for name in ("torch", "triton", "onnxruntime", "onnxruntime-gpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
