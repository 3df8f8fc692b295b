"""`angelforge bench pack`: the packer beside a plain copy of the same bytes."""

from __future__ import annotations

from pathlib import Path
from tempfile import gettempdir
from typing import Any

import click

from angelforge.errors import UsageError
from angelforge.precision import Precision
from angelforge.tools.options import NUMBER, json_option
from angelforge.tools.output import format_bytes, print_json, print_table


@click.command()
@click.option(
    "--size", "sizes", type=NUMBER, multiple=True, help="GB of the checkpoint, 0.7 at least; repeat for several."
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Copies and packings of each size, in turns.",
)
@click.option(
    "--precision",
    type=click.Choice([p.value for p in Precision]),
    default="bf16",
    show_default=True,
    help="Of the bundle; the checkpoint is bf16.",
)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to write; needs twice the size.")
@json_option
def pack(sizes: tuple[float, ...], rounds: int, precision: str, folder: Path | None, as_json: bool) -> None:
    """Pack random checkpoints and copy them, in turns; files are synced in both.

    \b
    Example:
      angelforge bench pack --size 0.7 --size 1.4 --size 2.8
    """
    from angelforge.exporter.measure import measure_packing

    if not all(0 < size < 1e5 for size in sizes):  # also false for NaN
        raise UsageError(f"--size is {', '.join(map(str, sizes))}, but sizes in GB above 0 are needed.")
    place = folder or Path(gettempdir())
    rows: list[dict[str, Any]] = []
    for size in sizes or (1.0,):
        found = measure_packing(place, int(size * 1e9), rounds, Precision(precision))
        rows.append(
            {
                "bytes": found.nbytes,
                "copy_rates": found.copy_rates,
                "pack_rates": found.pack_rates,
                "ratio": found.ratio,
                "peak_rss": found.peak_rss,
            }
        )
    if as_json:
        print_json(rows)
        return
    print_table(
        ("checkpoint", "copy GB/s", "pack GB/s", "pack/copy", "peak memory"),
        [
            (
                format_bytes(row["bytes"]),
                " ".join(f"{rate:.2f}" for rate in row["copy_rates"]),
                " ".join(f"{rate:.2f}" for rate in row["pack_rates"]),
                f"{row['ratio']:.2f}",
                format_bytes(row["peak_rss"]),
            )
            for row in rows
        ],
    )
