"""How commands print: JSON and tables on standard output, progress on standard error."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any

import click

SECONDS_BETWEEN_LINES = 10.0  # of progress where standard error is no terminal


def print_json(value: Any) -> None:
    """Print a value as indented JSON on standard output; in ASCII where that cannot have every character."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=not sys.stdout.encoding.lower().startswith("utf")))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print rows of text under column names; the last column is folded where the terminal is too narrow."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column != columns[-1])
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets in names are no markup
    # A pipe has no width: there a row is never folded, so that `grep` finds whole rows.
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def format_bytes(count: float) -> str:
    """Bytes in decimal units (GB = 10⁹ bytes), three digits: `104 GB`, `65.5 kB`, `12 B`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.3g} {unit}"


def format_seconds(seconds: float) -> str:
    """A duration to read: `0.35 s`, `12 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def total_progress(description: str, unit: str = "B") -> Iterator[Callable[[int, int], None]]:
    """Show the progress of long work; yields `report(done, total)`, both counted from the beginning of the work.

    What the first report calls done (work that an earlier call did) does not count for the rate. On a terminal a bar
    with rate and time left, elsewhere a line every ten seconds; always on standard error, so that the output stays
    clean. `unit` is "B" for bytes or the plural of what is counted ("tokens").
    """
    with _bar(description, unit) if sys.stderr.isatty() else _lines(description, unit) as report:
        yield report


@contextmanager
def _bar(description: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount = [DownloadColumn(), TransferSpeedColumn()] if unit == "B" else [MofNCompleteColumn(), TextColumn(unit)]
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def report(done: int, total: int) -> None:
            if not bars.task_ids:
                bars.add_task(description, total=total, completed=done)
            bars.update(bars.task_ids[0], completed=done, total=total)

        yield report


@contextmanager
def _lines(description: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    begin = last = monotonic()
    before: int | None = None

    def report(done: int, total: int) -> None:
        nonlocal before, last
        before = done if before is None else before
        now = monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            rate = (done - before) / (now - begin)
            click.echo(f"{description}: {_state(done, total, unit, rate)}", err=True)

    yield report


def _state(done: int, total: int, unit: str, rate: float) -> str:
    amount: Callable[[float], str] = format_bytes if unit == "B" else lambda count: f"{count:.3g} {unit}"
    left = f", {format_seconds((total - done) / rate)} left" if rate > 0 else ""
    return f"{100 * done / max(total, 1):.0f} % ({amount(done)} of {amount(total)}, {amount(rate)}/s{left})"
