"""Tries tiles near the default ones and keeps those that are right, do not spill, and are faster."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from angelforge.config import ModelConfig
from angelforge.errors import AngelForgeError
from angelforge.plugins.architectures import shared_limit
from angelforge.plugins.kernel import Tile
from angelforge.plugins.tuning import Row, profile_of
from angelforge.tools.kernel_bench.costs import cost_of
from angelforge.tools.kernel_bench.failures import LAUNCH_ERRORS, answers, reason
from angelforge.tools.kernel_bench.inputs import experts_used, make_inputs
from angelforge.tools.kernel_bench.measure import Machine, check, default_tile, rotation, time_work
from angelforge.tools.kernel_bench.statistics import geometric_mean
from angelforge.tools.kernel_bench.truth import by_torch
from angelforge.tools.kernel_bench.warm import Code, compile_tiles
from angelforge.tools.kernel_bench.work import CONTEXTS, Work, works

# What may change without changing results: a group of 128 channels is quantised by one program, so n stays where a
# kernel requantises; attention's order of keys stays, too.
FREE = {
    "Fp8Linear": ("m", "n", "k", "warps", "stages"),
    "Linear": ("m", "n", "k", "warps", "stages"),
    "GateUp": ("m", "n", "k", "warps", "stages"),
    "Fp8GateUp": ("m", "k", "warps", "stages"),
    "Fp8MoEGateUp": ("m", "k", "warps", "stages", "blocks_per_sm"),
    "Fp8MoEDown": ("m", "n", "k", "warps", "stages", "blocks_per_sm"),
    "MoEGateUp": ("m", "n", "k", "warps", "stages", "blocks_per_sm"),
    "MoEDown": ("m", "n", "k", "warps", "stages", "blocks_per_sm"),
    "PagedAttention": ("warps", "stages", "blocks_per_sm"),
}
LIMITS = {"m": (16, 128), "n": (32, 256), "k": (32, 128), "warps": (4, 8), "stages": (1, 6), "blocks_per_sm": (1, 8)}
PROFILE_TOKENS = {"8": (1, 8), "64": (32, 64), "256": (128, 256), "prefill": (1024, 8192)}
STATIC_SHARED = 48 * 1024  # bytes a block in decoding profiles
SEED = 1
MARGIN = 0.98  # a tile must be so much faster than the default to be written down


@dataclass(frozen=True)
class Task:
    """The calls that decide about one tile: one kernel, sizes and profile."""

    profile: str
    works: tuple[Work, ...]


def tasks(config: ModelConfig, operators: Sequence[str] = ()) -> list[Task]:
    """All that can be tuned; of these operators, or of all."""
    found: dict[tuple[str, str, str], list[Work]] = {}
    for profile, tokens in PROFILE_TOKENS.items():
        for work in works(config, tokens, CONTEXTS):
            name = work.operator.name
            if name in FREE and (not operators or name in operators) and profile_of(work.tokens) == profile:
                label = work.label if work.sequences is None else ""
                own = found.setdefault((name, label, profile), [])
                if work not in own:
                    own.append(work)
    return [Task(profile, tuple(own)) for (_, _, profile), own in found.items()]


def candidates(operator: str, tile: Tile) -> Iterator[Tile]:
    """The tile itself, then its neighbours: one free size doubled or halved, or some steps of a count."""
    yield tile
    free = FREE[operator]
    changes = [{name: getattr(tile, name) * 2} for name in free if name in ("m", "n", "k", "warps")]
    changes += [{name: getattr(tile, name) // 2} for name in free if name in ("m", "n", "k", "warps")]
    changes += [
        {name: getattr(tile, name) + step}
        for name in free
        if name in ("stages", "blocks_per_sm")
        for step in (1, -1, 2)
    ]
    if "k" in free:
        changes += [{"k": tile.k // 2, "stages": tile.stages + 2}, {"k": tile.k * 2, "stages": tile.stages - 1}]
    seen = {tile}
    for change in changes:
        changed = replace(tile, **change)
        inside = all(LIMITS[name][0] <= value <= LIMITS[name][1] for name, value in change.items())
        if inside and changed not in seen:
            seen.add(changed)
            yield changed


def usable(code: Code, profile: str, architecture: str = "sm_90") -> bool:
    """Whether a compiled tile may be used in a profile: no spills, no scratch, shared memory within its limit."""
    limit = shared_limit(architecture) if profile == "prefill" else STATIC_SHARED
    return not code.problem and code.spills == 0 and code.shared <= limit


def tune(
    all_tasks: Sequence[Task],
    machine: Machine,
    over: Callable[[], bool],
    say: Callable[[str], None],
    save: Callable[[Sequence[Row]], object] = lambda rows: None,
) -> tuple[list[Row], list[Task]]:
    """(rows of tiles that beat the default, tasks for which there was no time or that failed).

    `save` is given all rows after each new one.
    """
    pairs = [
        (task, tile)
        for task in all_tasks
        for tile in candidates(task.works[0].operator.name, default_tile(task.works[0], machine.gpu))
    ]
    codes = compile_tiles([(task.works[0], tile) for task, tile in pairs], machine.gpu.architecture)
    rows: list[Row] = []
    left: list[Task] = []
    for task in all_tasks:
        if over():
            left.append(task)
            continue
        tiles = [
            tile
            for (own, tile), code in zip(pairs, codes, strict=True)
            if own is task and usable(code, task.profile, machine.gpu.architecture)
        ]
        try:
            times = time_tiles(task, tiles, machine)
        except LAUNCH_ERRORS as error:
            say(f"{task.works[0].name}: {reason(error)}")
            left.append(task)
            if not answers(machine.device):
                say("The GPU does not answer any more: tuning ends here.")
                return rows, left
            continue
        row = best_row(task, times, machine)
        say(f"{task.works[0].operator.name} {task.works[0].label} ≤ {task.profile}: {len(times)} tiles, "
            + (f"{row.tile} at {row.microseconds:.1f} µs" if row else "the default stays"))  # fmt: skip
        if row:
            rows.append(row)
            save(rows)
    return rows, left


def best_row(task: Task, times: dict[Tile, float], machine: Machine) -> Row | None:
    """The fastest tile's row; None where the default (first) one is as fast, or nothing was timed."""
    if not times:
        return None
    default, best = default_tile(task.works[0], machine.gpu), min(times, key=lambda tile: times[tile])
    if best == default or (default in times and times[best] > MARGIN * times[default]):
        return None
    work = task.works[0]
    return Row(
        operator=work.operator.name,
        gpu_name=machine.gpu_name,
        architecture=machine.gpu.architecture,
        sms=machine.gpu.sms,
        profile=task.profile,
        sizes=tuple(sorted(work.sizes().items())),
        tile=best,
        microseconds=round(times[best], 3),
    )


def time_tiles(task: Task, tiles: Sequence[Tile], machine: Machine) -> dict[Tile, float]:
    """The geometric mean of the calls' µs for each tile that gives right results."""
    times: dict[Tile, list[float]] = {tile: [] for tile in tiles}
    for work in task.works:
        inputs = make_inputs(work, SEED, machine.device)
        wanted = by_torch(work, inputs)
        sets = rotation(work, inputs, cost_of(work, experts_used(work, inputs)), SEED)
        for tile in list(times):
            try:
                verdict = check(work, inputs, wanted, tile, machine.gpu)
            except AngelForgeError:  # the driver refuses it
                verdict = None
            if verdict is None or not verdict.ok:
                del times[tile]
            else:
                times[tile].append(time_work(work, sets, tile, machine.gpu).median)
    return {tile: geometric_mean(found) for tile, found in times.items()}
