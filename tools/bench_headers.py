"""`angelforge bench headers`: what can be said about the real 103B model without its weights, and how fast."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import click

from angelforge.tools.options import json_option
from angelforge.tools.output import format_bytes, format_seconds, print_json, print_table


@click.command()
@click.option("--fp8", is_flag=True, help="The FP8 release's tensors instead of the BF16 ones.")
@json_option
def headers(fp8: bool, as_json: bool) -> None:
    """Check, plan and draw the graph of a sparse checkpoint of AntAngelMed's full shape; it takes no disk space.

    \b
    Example:
      angelforge bench headers --fp8
    """
    from angelforge.checkpoint import Checkpoint
    from angelforge.engines.planner import PlanRequest, plan
    from angelforge.exporter.export import PAGE_SIZE
    from angelforge.exporter.graph import build_graph
    from angelforge.exporter.measure import peak_memory
    from angelforge.exporter.synthetic import write_sparse_checkpoint
    from angelforge.precision import natural_precision
    from angelforge.targets import get_target

    times: dict[str, float] = {}
    with TemporaryDirectory(prefix="angelforge-headers-") as scratch:
        folder = write_sparse_checkpoint(Path(scratch, "checkpoint"), fp8=fp8)
        begin = perf_counter()
        checkpoint = Checkpoint.open(folder)
        checkpoint.check()
        times["header check"] = perf_counter() - begin
        config = checkpoint.config
        precision = natural_precision(config)
        begin = perf_counter()
        plan(PlanRequest(config, precision, get_target("h20"), max_context=config.max_context))
        times["plan"] = perf_counter() - begin
        begin = perf_counter()
        build_graph(config, precision, PAGE_SIZE, config.max_context)
        times["graph of all layers"] = perf_counter() - begin
    peak = peak_memory()
    if as_json:
        print_json({"tensors": len(checkpoint.tensors), "seconds": times, "peak_rss": peak})
        return
    print_table(("step", "time"), [(name, format_seconds(seconds)) for name, seconds in times.items()])
    click.echo(
        f"{len(checkpoint.tensors):,} tensors, {format_bytes(checkpoint.nbytes)}; peak memory {format_bytes(peak)}"
    )
