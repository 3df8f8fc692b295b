"""Options of the commands that load an engine."""

from __future__ import annotations

import click

from angelforge.errors import UsageError
from angelforge.machine import cores
from angelforge.tools.options import NUMBER


def _bytes(context: click.Context, parameter: click.Parameter, value: float | None) -> int | None:
    if value is None:
        return None
    if not 0 < value < 1e9:
        raise UsageError(f"--kv-memory-gb is {value:g}, but a number of GB above 0, below 10⁹, is needed.")
    return int(value * 1e9)


def _threads(context: click.Context, parameter: click.Parameter, value: int | None) -> int | None:
    most = 4 * cores()
    if value is not None and value > most:
        raise UsageError(f"--threads is {value}, but more than {most} only hinder each other on {cores()} cores.")
    return value


target_option = click.option("--target", default="cpu", show_default=True, help="The target whose engine is used.")

#: The parameter is called `kv_memory` and is in bytes, or None.
kv_memory_option = click.option(
    "--kv-memory-gb",
    "kv_memory",
    type=NUMBER,
    callback=_bytes,
    help="Memory of the KV cache in GB (10⁹ bytes). Default: what is needed, at most a quarter of what is free; with "
    "TensorRT all that is left.",
)

threads_option = click.option(
    "--threads", type=click.IntRange(min=1), callback=_threads, help="CPU threads. Default: all cores."
)

cuda_graphs_option = click.option(
    "--cuda-graphs/--no-cuda-graphs",
    default=True,
    show_default=True,
    help="On a GPU, decode in CUDA graphs; without is slower, for finding faults.",
)

tensor_parallel_option = click.option(
    "--tensor-parallel",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Ranks that share the model, as built; torchrun starts them.",
)
