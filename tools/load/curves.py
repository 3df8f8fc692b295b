"""Several lines over a logarithmic scale of clients, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

from angelforge.tools.svg import COLOURS


def curves(lines: Sequence[Sequence[tuple[float, float]]], width: int = 900, height: int = 220) -> str:
    """Lines of points (x > 0 on a scale of powers of two, y from 0 up); every x is marked, and the largest y."""
    points = [point for line in lines for point in line]
    if not points:
        return ""
    scale = [math.log2(x) for x, _ in points]
    first, span, top = min(scale), max(max(scale) - min(scale), 1e-9), max(max(y for _, y in points), 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        return 40 + (math.log2(x) - first) / span * (width - 130), height - 24 - y / top * (height - 44)

    shapes = []
    for share in (0.0, 0.5, 1.0):
        y = place(points[0][0], share * top)[1]
        shapes.append(f'<line x1="40" x2="{width - 90}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        shapes.append(f'<text x="36" y="{y + 4:.1f}" text-anchor="end">{share * top:.3g}</text>')
    for number, line in enumerate(lines):
        places = [place(x, y) for x, y in sorted(line)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        colour = COLOURS[number % len(COLOURS)]
        shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (_, value) in zip(places, sorted(line), strict=True):
            shapes.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{value:.4g}</title></circle>'
            )
    for x in sorted({x for x, _ in points}):
        shapes.append(f'<text x="{place(x, 0)[0]:.1f}" y="{height - 6}" text-anchor="middle">{x:g}</text>')
    shapes.append(f'<text x="{width - 2}" y="{height - 6}" text-anchor="end">clients</text>')
    return f'<svg width="{width}" height="{height}" role="img">{"".join(shapes)}</svg>'
