"""One run on the GPU: numerics of everything first, then times, the heaviest calls first, within a time limit."""

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from time import monotonic

import torch

from angelforge.config import ModelConfig
from angelforge.errors import AngelForgeError
from angelforge.exporter.synthetic_config import FULL_CONFIG
from angelforge.plugins.kernel import Gpu, Tile
from angelforge.plugins.tensorrt.gpu import GpuFacts
from angelforge.tools.kernel_bench.checks import BodyCheck, check_against_body, check_works, has_kernel
from angelforge.tools.kernel_bench.execution import execute
from angelforge.tools.kernel_bench.goals import target_of
from angelforge.tools.kernel_bench.measure import Machine, Measurement, default_tile, measure
from angelforge.tools.kernel_bench.report import Report
from angelforge.tools.kernel_bench.timing import achievable_bandwidth
from angelforge.tools.kernel_bench.warm import compile_tiles
from angelforge.tools.kernel_bench.work import Work, works

Say = Callable[[str], None]
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
    jobs = {
        (w.operator.name, tuple(sorted(w.sizes().items())), tile): (w, tile)
        for w, tile in [*checks, *((w, default_tile(w, gpu)) for w in chosen)]
    }
    say(f"Compiling {len(jobs)} tiles …")
    compile_tiles(jobs.values(), gpu.architecture)
    failed: list[str] = []
    say(f"Comparing {len(checks)} tiles with function bodies …")
    verdicts = _check_all(checks, gpu, seed, failed)
    measurements, skipped = _measure_all(chosen, machine, deadline, seed, failed, say)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Report(machine, versions(), date, verdicts, measurements, skipped, failed)


def _check_all(checks: Iterable[tuple[Work, Tile]], gpu: Gpu, seed: int, failed: list[str]) -> list[BodyCheck]:
    found = []
    for work, tile in checks:
        try:
            found.append(check_against_body(work, tile, partial(execute, gpu=gpu), seed, "cuda"))
        except AngelForgeError as error:
            failed.append(f"{work.name}: {error}")
    return found


def _measure_all(
    chosen: Iterable[Work], machine: Machine, deadline: Deadline, seed: int, failed: list[str], say: Say
) -> tuple[list[Measurement], list[str]]:
    found, skipped, compared = [], [], set()
    for work in chosen:
        if deadline.over():
            skipped.append(work.name)
            continue
        tile = default_tile(work, machine.gpu)
        key = (work.operator.name, work.label, tile)
        try:
            measurement = measure(work, machine, seed, check_ptx=key not in compared)
        except AngelForgeError as error:
            failed.append(f"{work.name}: {error}")
            continue
        except torch.cuda.OutOfMemoryError:
            skipped.append(f"{work.name} (too little GPU memory)")
            continue
        finally:
            torch.cuda.empty_cache()
        compared.add(key)
        found.append(measurement)
        say(f"{work.name}: {measurement.timing.median:.1f} µs")
    return found, skipped


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {}
    for name in ("torch", "triton", "onnxruntime", "onnxruntime-gpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
