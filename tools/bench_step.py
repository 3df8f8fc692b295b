"""`angelforge bench step`: how long one packed call takes."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import click

from angelforge.errors import UsageError
from angelforge.tools.options import bundle_argument, json_option
from angelforge.tools.output import print_json, print_table

if TYPE_CHECKING:
    from angelforge.runtime.batch import Batch
    from angelforge.runtime.engines import Engine


@click.command()
@bundle_argument
@click.option("--target", default="cpu", show_default=True, help="Which engine of the bundle.")
@click.option("--prompt", default=96, show_default=True, help="Tokens of the prefill.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=50, show_default=True, help="Calls to take the median of."
)
@json_option
def step(bundle: Path, target: str, prompt: int, rounds: int, as_json: bool) -> None:
    """Time a prefill and a decode step after it, of one sequence; host work around the call is not counted.

    \b
    Example:
      angelforge bench step demo/bundle --prompt 96
    """
    from angelforge.bundle import Bundle
    from angelforge.runtime.engines import load_engine

    opened = Bundle.open(bundle)
    if not 1 <= prompt < opened.manifest.max_context:
        raise UsageError(f"--prompt is {prompt}, but 1 to {opened.manifest.max_context - 1} tokens fit the context.")
    engine = load_engine(opened, target, max_batch=1)
    rows = [
        {"call": f"prefill of {prompt} tokens", **_time(engine, _batch(engine, 0, prompt), rounds)},
        {"call": f"decode at {prompt} tokens", **_time(engine, _batch(engine, prompt, 1), rounds)},
    ]
    engine.close()
    if as_json:
        print_json(rows)
        return
    print_table(
        ("call", "median ms", "fastest ms"), [(str(r["call"]), f"{r['median']:.2f}", f"{r['least']:.2f}") for r in rows]
    )


def _batch(engine: Engine, start: int, count: int) -> Batch:
    """Tokens `start` to `start + count` of one sequence whose pages are 1, 2, …"""
    import numpy as np

    from angelforge.runtime.batch import Batch

    positions = np.arange(start, start + count, dtype=np.int32)
    pages = -(-(start + count) // engine.page_size)
    return Batch(
        input_ids=positions.astype(np.int64) % engine.config.vocab_size,
        positions=positions,
        num_tokens=np.array([count], np.int32),
        query_start=np.array([0, count], np.int32),
        kv_length=np.array([start + count], np.int32),
        page_table=np.arange(1, pages + 1, dtype=np.int32)[None],
        slots=positions + engine.page_size,
        logit_indices=np.array([count - 1]),
    )


def _time(engine: Engine, batch: Batch, rounds: int) -> dict[str, float]:
    for _ in range(3):
        engine.forward(batch)
    times = []
    for _ in range(rounds):
        begin = perf_counter()
        engine.forward(batch)
        times.append(1e3 * (perf_counter() - begin))
    return {"median": median(times), "least": min(times)}
