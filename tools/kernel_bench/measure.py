"""Measures one call on the GPU: is it right, how long does it take, what share of the limits is that."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from angelforge.plugins.kernel import Gpu, Tile
from angelforge.plugins.tensorrt.kernels import find_kernel
from angelforge.plugins.tuning import tile_for, tile_step
from angelforge.targets import Target
from angelforge.tools.kernel_bench.compare import Verdict, compare
from angelforge.tools.kernel_bench.costs import Cost, binding_of, cost_of
from angelforge.tools.kernel_bench.execution import by_driver, execute, outputs_for, plan, ptx_equals_triton
from angelforge.tools.kernel_bench.goals import Goal, goal_of, peak_flops
from angelforge.tools.kernel_bench.inputs import experts_used, make_inputs
from angelforge.tools.kernel_bench.rivals.plain_torch import rival
from angelforge.tools.kernel_bench.statistics import Timing, copies_for
from angelforge.tools.kernel_bench.timing import time_calls
from angelforge.tools.kernel_bench.truth import by_torch
from angelforge.tools.kernel_bench.work import Work

Tensors = Sequence[torch.Tensor]
SHARED_BYTES = 2**28  # inputs from this size on are not copied for the rotation: a call reads other parts of them


@dataclass(frozen=True)
class Machine:
    """The GPU of a run."""

    gpu_name: str
    gpu: Gpu
    target: Target | None  # None: nominal figures are not known
    achievable: float  # bytes/s of a read-only kernel in this run
    device: str = "cuda"  # as torch names it


@dataclass(frozen=True)
class Measurement:
    """One call's figures. Shares are of the call's least bytes or FLOP, see `costs`."""

    work: Work
    tile: Tile
    cost: Cost
    timing: Timing
    verdict: Verdict | None  # against plain torch or the body at the real size; None where neither can follow
    ptx_equal: bool | None  # None where this tile was compared in an earlier call
    rival: tuple[str, float] | None  # name, µs
    nominal_share: float | None  # of bandwidth
    achievable_share: float
    peak_share: float | None  # of the tensor cores' rate
    goal: Goal | None
    limit: float | None  # µs that the call needs at the target's nominal rates

    @property
    def goal_met(self) -> bool | None:
        """None without a goal or without the figures for it."""
        if self.goal is None:
            return None
        figures = {"us": self.timing.median, "achievable": self.achievable_share, "peak": self.peak_share}
        found = figures[self.goal.kind]
        return None if found is None else self.goal.met(found)

    @property
    def rival_ratio(self) -> float | None:
        """Our time over plain torch's: below 1 ours is faster."""
        return None if self.rival is None else self.timing.median / self.rival[1]

    @property
    def right(self) -> bool:
        """Nothing that was compared differs."""
        return self.ptx_equal is not False and (self.verdict is None or self.verdict.ok)


def default_tile(work: Work, gpu: Gpu) -> Tile:
    """The tile that an engine's profile for the call's tokens has."""
    return tile_for(find_kernel(work.operator), binding_of(work).dims, gpu, tile_step(work.tokens))


def measure(work: Work, machine: Machine, seed: int, check_ptx: bool) -> Measurement:
    """Checks, then times one call. The GPU's memory is given back.

    Raises:
        AngelForgeError: the kernel cannot be compiled or launched.
    """
    tile = default_tile(work, machine.gpu)
    inputs = make_inputs(work, seed, machine.device)
    verdict = check(work, inputs, by_torch(work, inputs), tile, machine.gpu)
    same = ptx_equals_triton(work, inputs, tile, machine.gpu) if check_ptx else None
    cost = cost_of(work, experts_used(work, inputs))
    sets = rotation(work, inputs, cost, seed)
    timing = time_work(work, sets, tile, machine.gpu)
    beside = _time_rival(work, sets)
    seconds = timing.median * 1e-6
    target = machine.target
    peak = None if target is None else peak_flops(work, target)
    return Measurement(
        work=work,
        tile=tile,
        cost=cost,
        timing=timing,
        verdict=verdict,
        ptx_equal=same,
        rival=beside,
        nominal_share=cost.nbytes / seconds / target.bandwidth if target and target.bandwidth else None,
        achievable_share=cost.nbytes / seconds / machine.achievable,
        peak_share=cost.flops / seconds / peak if peak and cost.flops else None,
        goal=goal_of(work, target),
        limit=1e6 * cost.seconds(target.bandwidth, peak) if target and target.bandwidth and peak else None,
    )


def _time_rival(work: Work, sets: Sequence[Tensors]) -> tuple[str, float] | None:
    """Plain torch's name and µs on the same sets of inputs; None where there is nothing alike, or torch has no kernel
    for it on this GPU.
    """
    ports = [port.name for port in work.operator.inputs]
    found = [rival(work, dict(zip(ports, inputs, strict=True))) for inputs in sets]
    calls = [other[1] for other in found if other is not None]
    if found[0] is None:
        return None
    try:
        return found[0][0], time_calls(calls).median
    except RuntimeError:
        return None


def check(work: Work, inputs: Tensors, wanted: Tensors | None, tile: Tile, gpu: Gpu) -> Verdict | None:
    """Runs the call once and compares it with the truth, if there is one."""
    if wanted is None:
        return None
    return compare(work.operator, inputs, work.attributes, execute(work, inputs, tile, gpu), wanted)


def rotation(work: Work, inputs: Tensors, cost: Cost, seed: int) -> list[Tensors]:
    """Sets of inputs that the L2 cache cannot hold together, these first."""
    names = [port.name for port in work.operator.inputs]
    large = {name: x for name, x in zip(names, inputs, strict=True) if x.nbytes >= SHARED_BYTES}
    device = str(inputs[0].device)
    others = [make_inputs(work, seed + i, device, large) for i in range(1, copies_for(cost.nbytes))]
    return [inputs, *others]


def time_work(work: Work, sets: list[Tensors], tile: Tile, gpu: Gpu) -> Timing:
    """The time of one launch, going round through sets of inputs."""
    launch = plan(work, sets[0], gpu, tile)
    return time_calls([partial(by_driver, launch, own, outputs_for(work, own)) for own in sets])
