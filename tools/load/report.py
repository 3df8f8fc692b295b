"""How figures under load are shown: a table, JSON, and a page with curves."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from angelforge.atomic import write_atomic
from angelforge.tools.load.curves import curves
from angelforge.tools.load.figures import Figures
from angelforge.tools.output import print_table
from angelforge.tools.svg import legend

_COLUMNS = (
    "clients", "draft", "tokens/s", "× without", "of the limit", "first token ms 50/90/99 %",
    "between tokens ms 50/90/99 %", "tokens a round", "requests",
)  # fmt: skip


def ratio(figures: Figures, others: Sequence[Figures]) -> float | None:
    """How much faster a run with the draft was than that without at the same concurrency, None without both."""
    for other in others:
        if figures.drafted and not other.drafted and other.concurrency == figures.concurrency:
            return figures.tokens_per_second / other.tokens_per_second
    return None


def to_json(found: Sequence[Figures], about: dict[str, Any]) -> dict[str, Any]:
    """Everything, with the ratios."""
    return {**about, "runs": [figures.to_dict() | {"speedup": ratio(figures, found)} for figures in found]}


def print_figures(found: Sequence[Figures]) -> None:
    """A row each."""
    print_table(_COLUMNS, [_row(figures, found) for figures in found])


def write_plot(path: Path, found: Sequence[Figures], title: str) -> None:
    """One HTML file that needs nothing but a browser."""
    kinds = [(drafted, name) for drafted, name in ((False, "without draft"), (True, "with draft"))
             if any(figures.drafted == drafted for figures in found)]  # fmt: skip
    parts = []
    for heading, value in (
        ("Tokens per second", lambda figures: figures.tokens_per_second),
        ("Time to first token, median ms", lambda figures: _median(figures.first_token_ms)),
        ("Between tokens, median ms", lambda figures: _median(figures.between_tokens_ms)),
    ):
        lines = [
            [(float(figures.concurrency), value(figures)) for figures in found if figures.drafted == drafted]
            for drafted, _ in kinds
        ]
        parts.append(f"<h2>{escape(heading)}, by clients</h2>{legend([name for _, name in kinds])}{curves(lines)}")
    cells = "".join(f"<th>{escape(column)}</th>" for column in _COLUMNS)
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in _row(figures, found))}</tr>" for figures in found
    )
    style = (
        "body{font-family:sans-serif;margin:2em;max-width:70em}td,th{padding:.2em .8em;text-align:right}"
        ".legend span{margin-right:1.5em}.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.4em}"
    )
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{style}</style></head><body><h1>{escape(title)}</h1>{''.join(parts)}"
        f"<table><tr>{cells}</tr>{rows}</table></body></html>\n"
    )
    write_atomic(path, page.encode())


def _row(figures: Figures, found: Sequence[Figures]) -> tuple[str, ...]:
    speedup, limit = ratio(figures, found), figures.limit_tokens_per_second
    return (
        str(figures.concurrency),
        "yes" if figures.drafted else "no",
        f"{figures.tokens_per_second:.0f}",
        "" if speedup is None else f"{speedup:.2f}",
        "" if limit is None else f"{figures.tokens_per_second / limit:.0%}",
        _three(figures.first_token_ms),
        _three(figures.between_tokens_ms),
        "" if figures.accepted_length is None else f"{figures.accepted_length:.2f}",
        str(figures.requests),
    )


def _three(percentiles: dict[str, float] | None) -> str:
    return "" if percentiles is None else " / ".join(f"{value:.3g}" for value in percentiles.values())


def _median(percentiles: dict[str, float] | None) -> float:
    return 0.0 if percentiles is None else percentiles["50"]
