"""Bars, areas and chains of boxes as SVG, for pages that need nothing but a browser."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Okabe and Ito's, told apart with any colour vision (jfly.uni-koeln.de/color), then a grey and three tints.
COLOURS: tuple[str, ...] = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#56b4e9",
    "#cc79a7",
    "#f0e442",
    "#000000",
    "#999999",
)
COLOURS += ("#7b4ea3", "#8c5e2a", "#c8e0f0")


@dataclass(frozen=True)
class Part:
    """A part of a bar: its name, how much it is, and how that reads."""

    name: str
    amount: float
    text: str


def stacked_bar(parts: Sequence[Part], limit: float, width: int = 900, height: int = 26) -> str:
    """Parts side by side on a scale that ends at `limit`, or at their sum where that is more; the limit is marked."""
    total = max(limit, sum(part.amount for part in parts), 1.0)
    at, shapes = 0.0, []
    for i, part in enumerate(parts):
        size = part.amount / total * width
        shapes.append(
            f'<rect x="{at:.1f}" y="2" width="{max(size, 0.5):.1f}" height="{height}" '
            f'fill="{COLOURS[i % len(COLOURS)]}"><title>{escape(f"{part.name}: {part.text}")}</title></rect>'
        )
        at += size
    mark = limit / total * width
    line = f'<line x1="{mark:.1f}" x2="{mark:.1f}" y1="0" y2="{height + 4}" stroke="black" stroke-width="2"/>'
    return f'<svg width="{width + 2}" height="{height + 4}" role="img">{"".join(shapes)}{line}</svg>'


def legend(names: Sequence[str]) -> str:
    """The colours of a bar's parts."""
    entries = (
        f'<span><i style="background:{COLOURS[i % len(COLOURS)]}"></i>{escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(entries)}</p>'


def area(values: Sequence[float], width: int = 900, height: int = 90) -> str:
    """One value after another as an area; its top is the greatest."""
    top = max([*values, 1.0])
    step = width / max(len(values), 1)
    points = [(0.0, 0.0)]
    for i, value in enumerate(values):
        points += [(i * step, value), ((i + 1) * step, value)]
    points.append((float(width), 0.0))
    path = " ".join(f"{x:.1f},{height - value / top * height:.1f}" for x, value in points)
    return f'<svg width="{width}" height="{height}" role="img"><polygon points="{path}" fill="{COLOURS[0]}"/></svg>'


def chain(boxes: Sequence[tuple[str, str]]) -> str:
    """Boxes in order, each with a name and what stands below it."""
    drawn = (f"<div class=box><b>{escape(name)}</b><small>{escape(below)}</small></div>" for name, below in boxes)
    return f'<div class="chain">{"<span>→</span>".join(drawn)}</div>'
