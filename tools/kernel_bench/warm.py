"""Compiles many tiles at once, in processes of their own: Triton's disk cache then has them for whoever launches."""

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from angelforge.plugins.kernel import Tile
from angelforge.plugins.tensorrt.kernels import find_kernel
from angelforge.tools.kernel_bench.costs import binding_of
from angelforge.tools.kernel_bench.work import Work

MOST_WORKERS = 16


@dataclass(frozen=True)
class Code:
    """What is known of a compiled tile; `problem` says why it cannot be used."""

    registers: int
    shared: int  # bytes a block
    spills: int
    problem: str = ""


def compile_tile(work: Work, tile: Tile, architecture: str) -> Code:
    """Compiles one tile for a GPU that need not be there."""
    from angelforge.plugins.compile import compile_kernel
    from angelforge.tools.kernel_bench.failures import LAUNCH_ERRORS

    try:
        found = compile_kernel(find_kernel(work.operator), binding_of(work), tile, architecture)
    except LAUNCH_ERRORS as error:
        return Code(0, 0, 0, f"{type(error).__name__}: {str(error).strip()[-200:]}")
    if found.scratch:
        return Code(found.registers, found.shared, found.spills, "needs scratch memory")
    return Code(found.registers, found.shared, found.spills)


def compile_tiles(jobs: Iterable[tuple[Work, Tile]], architecture: str, workers: int | None = None) -> list[Code]:
    """All of them, in their order; `workers` processes, by default one a core."""
    chosen = list(jobs)
    count = min(workers or os.cpu_count() or 1, MOST_WORKERS, max(1, len(chosen)))
    # The operator's functions cannot be sent to a process: its name can.
    plain = [(work.operator.name, work.dims, work.attributes, tile, architecture) for work, tile in chosen]
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_compile_named, *zip(*plain, strict=True))) if plain else []


def _compile_named(
    operator: str, dims: dict[str, int], attributes: dict[str, int | float], tile: Tile, architecture: str
) -> Code:
    from angelforge.plugins.registry import OPERATORS

    return compile_tile(Work(OPERATORS[operator], "", dims, attributes), tile, architecture)
