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
from angelforge.plugins.compile import COMPILE_ERRORS
from angelforge.plugins.kernel import Gpu, Tile
from angelforge.plugins.tensorrt.gpu import GpuFacts
from angelforge.tools.kernel_bench.checks import check_against_body, check_works, has_kernel
from angelforge.tools.kernel_bench.execution import execute
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
        AngelForgeError: it is not the GPU that torch uses.
    """
    name = torch.cuda.get_device_name()
    if name != facts.name:
        raise AngelForgeError(
            f"The driver's first GPU is {facts.name}, but torch uses {name}; set CUDA_VISIBLE_DEVICES."
        )
    gpu = Gpu(facts.architecture, facts.sms)
    return Machine(name, gpu, target_of(name, facts.memory_bytes), achievable_bandwidth(facts.sms))


def run(machine: Machine, operators: Sequence[str], deadline: Deadline, seed: int, say: Say) -> Report:
    """Checks and measures everything that there is time for."""
    chosen, gpu = all_works(full_config(), operators), machine.gpu
    checks = list(check_works(gpu, operators))
    trouble = Trouble([], [])
    tiles = _compile_all([*checks, *((work, default_tile(work, gpu)) for work in chosen)], gpu, trouble, say)
    verdicts = []
    say(f"Comparing {len(checks)} tiles with function bodies …")
    run_here = partial(execute, gpu=gpu)
    for work, tile in checks:
        if _key(work, tile) in tiles:
            attempt = partial(check_against_body, work, tile, run_here, seed, machine.device)
            verdicts += trouble.attempt(work, deadline, attempt)
    measurements, compared = [], set()
    for work in chosen:
        key = _key(work, default_tile(work, gpu))
        if key in tiles:
            attempt_one = partial(measure, work, machine, seed, check_ptx=key not in compared)
            for found in trouble.attempt(work, deadline, attempt_one):
                measurements.append(found)
                compared.add(key)
                say(f"{work.name}: {found.timing.median:.1f} µs")
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Report(machine, versions(), date, verdicts, measurements, trouble.skipped, trouble.failed)


def compare_engines(
    measurements: Sequence[Measurement], machine: Machine, deadline: Deadline, seed: int, say: Say
) -> Comparison:
    """Other engines' kernels at the calls that were measured. What they print goes to standard error."""
    with redirect_stdout(sys.stderr):
        rivals = Rivals()
        say(f"Other engines' kernels: {', '.join(rivals.versions) or 'none is installed'} …")
        return rivals.all_beside(measurements, machine, deadline.over, seed, say)


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
        except RuntimeError as error:  # a CUDA error: the context is of no use any more
            self.failed.append(f"{work.name}: {str(error).splitlines()[0]}; the run ends here")
            self.lost = True
        except COMPILE_ERRORS as error:
            self.failed.append(f"{work.name}: {error}")
        if not self.lost:
            torch.cuda.empty_cache()
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
