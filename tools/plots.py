"""Two plots as SVG: bars on a logarithmic scale, and one value after another with marks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from angelforge.tools.svg import COLOURS

WRONG = "#b3261e"
_LEAST = 1e-9  # relative errors below are drawn as this


def log_bars(values: Mapping[str, float], limit: float | None, width: int = 900, height: int = 160) -> str:
    """A bar for each name from 1e-9 to 10, logarithmic; those above `limit` are red, the limit is a line."""

    def level(value: float) -> float:
        bounded = min(max(value, _LEAST), 10.0) if not math.isnan(value) else 10.0
        return (math.log10(bounded) + 9) / 10 * (height - 20)

    step = width / max(len(values), 1)
    shapes = []
    for i, (name, value) in enumerate(values.items()):
        tall = level(value) + 1
        colour = WRONG if limit is not None and not value <= limit else COLOURS[0]
        shapes.append(
            f'<rect x="{i * step + 1:.1f}" y="{height - tall:.1f}" width="{max(step - 2, 1):.1f}" height="{tall:.1f}" '
            f'fill="{colour}"><title>{escape(f"{name}: {value:.2e}")}</title></rect>'
        )
    for power in range(-8, 2, 2):
        y = height - level(10.0**power)
        shapes.append(f'<line x1="0" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        shapes.append(f'<text x="2" y="{y - 2:.1f}">1e{power}</text>')
    if limit:
        y = height - level(limit)
        shapes.append(f'<line x1="0" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="{WRONG}" stroke-dasharray="4"/>')
    return f'<svg width="{width}" height="{height}" role="img">{"".join(shapes)}</svg>'


def line_plot(
    values: Sequence[float], marked: Sequence[bool], top: float | None = None, width: int = 900, height: int = 120
) -> str:
    """One value after another as a line, from 0 to `top` (default: the largest); marked ones are red dots."""
    most = top if top is not None else max([v for v in values if math.isfinite(v)] + [1e-12])
    step = width / max(len(values) - 1, 1)
    places = [(i * step, height - min(v, most) / most * (height - 16)) for i, v in enumerate(values)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{WRONG}"/>'
        for (x, y), mark in zip(places, marked, strict=True)
        if mark
    )
    line = f'<polyline points="{path}" fill="none" stroke="{COLOURS[0]}" stroke-width="1.5"/>'
    return f'<svg width="{width}" height="{height}" role="img">{line}{dots}<text x="2" y="11">{most:.3g}</text></svg>'
