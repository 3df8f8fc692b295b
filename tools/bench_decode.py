"""`angelforge bench decode`: how fast a bundle generates in this process, by how many requests run at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from angelforge.runtime.depth import Depth
from angelforge.tools.engine_options import kv_memory_option, target_option, threads_option
from angelforge.tools.load.options import Asks, LoadOptions, load_options
from angelforge.tools.options import bundle_argument, json_option
from angelforge.tools.output import print_json, total_progress
from angelforge.tools.speculation_text import speculate_option

if TYPE_CHECKING:
    from angelforge.manifest import Manifest
    from angelforge.tools.load.figures import Figures


@click.command()
@bundle_argument
@target_option
@load_options
@speculate_option
@kv_memory_option
@threads_option
@json_option
def decode(
    bundle: Path,
    target: str,
    load: LoadOptions,
    speculate: Depth,
    kv_memory: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Generate under load without a server: tokens/s, time to the first token, time between tokens.

    Everything runs once without the bundle's draft and then, where it has one, once with it. As soon as a request ends
    the next begins. Beside it stands the physical limit of the target's memory, without a draft; a CPU's is not known.

    \b
    Example:
      angelforge bench decode demo/bundle --concurrency 1,8 --dataset calls.jsonl
    """
    from angelforge.bundle import Bundle

    manifest = Bundle.open(bundle).manifest
    found: list[Figures] = []
    loading: dict[str, Any] = {"kv_memory": kv_memory, "threads": threads, "max_batch": max(load.concurrencies)}
    for depth in depths(manifest, speculate):
        found += _measure(bundle, target, manifest, load, {**loading, "speculate": depth})
    report(found, {"bundle": str(bundle), "target": target}, load.plot, as_json)


def _measure(
    bundle: Path,
    target: str,
    manifest: Manifest,
    load: LoadOptions,
    loading: dict[str, Any],
) -> list[Figures]:
    from angelforge.runtime.llm import LLM
    from angelforge.targets import get_target
    from angelforge.tools.load.figures import summarize
    from angelforge.tools.load.in_process import run_in_process
    from angelforge.tools.load.limit import limit_of

    found, drafted = [], loading["speculate"] != 0
    asks = Asks(load, manifest.model.vocab_size)  # the same with the draft and without
    with LLM(bundle, target, **loading) as llm:
        run_in_process(llm, asks.take(1)[:1], 1, load.temperature, lambda ended, all_: None)  # first calls are slower
        for concurrency in load.concurrencies:
            before, these = llm.speculation, asks.take(concurrency)
            name = f"{concurrency} at once, with{'' if drafted else 'out'} the draft"
            with total_progress(name, "requests") as tell:
                samples, seconds = run_in_process(llm, these, concurrency, load.temperature, tell)
            accepted = None
            if before is not None and llm.speculation is not None and llm.speculation.rounds > before.rounds:
                rounds = llm.speculation.rounds - before.rounds
                accepted = 1 + (llm.speculation.accepted - before.accepted) / rounds
            limit = limit_of(manifest, get_target(target), concurrency, samples)
            found.append(summarize(samples, concurrency, drafted, seconds, accepted, limit))
    return found


def depths(manifest: Manifest, speculate: Depth) -> list[Depth]:
    """Without the draft, and with it where there is one."""
    return [0] if manifest.draft is None or speculate == 0 else [0, speculate]


def report(found: Sequence[Figures], about: dict[str, Any], plot: Path | None, as_json: bool) -> None:
    """Shows figures in the ways that were asked for."""
    from angelforge.tools.load.report import print_figures, to_json, write_plot

    if plot is not None:
        write_plot(plot, found, " · ".join(map(str, about.values())))
    if as_json:
        print_json(to_json(found, about))
    else:
        print_figures(found)
