"""Plots as SVG: bars on a logarithmic scale, shares in percent, and one value after another with marks.

They scale with the page and print in black and white: what is wrong differs by colour (blue and vermilion, which are
told apart with any colour vision: Okabe and Ito, jfly.uni-koeln.de/color), and by a mark, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

RIGHT, WRONG = "#0072b2", "#d55e00"
_LEAST, _MOST = 1e-9, 10.0  # relative errors are drawn between these
_LEFT, _TOP, _BOTTOM = 72, 16, 36  # room for labels
_WIDEST = 90
_FEW = 24  # so many names fit below bars


def log_bars(values: Mapping[str, float], limit: float | None, width: int = 1000, height: int = 200) -> str:
    """A bar for each name from 1e-9 to 10; those above `limit` are orange with a cross, the limit is a dashed line."""
    floor = height - _BOTTOM

    def y(value: float) -> float:
        bounded = _MOST if math.isnan(value) else min(max(value, _LEAST), _MOST)
        share = math.log10(bounded / _LEAST) / math.log10(_MOST / _LEAST)
        return floor - share * (floor - _TOP)

    shapes = [_grid(y(10.0**power), f"1e{power}" if power else "1", width) for power in range(-6, 2, 2)]
    shapes += [_text(_LEFT - 6, floor + 4, "0", "end"), _title("relative error", floor)]
    for i, (name, value) in enumerate(values.items()):
        wrong = limit is not None and not value <= limit
        label = f"{name}: {value:.2e}"
        shapes += _bar(i, len(values), name, y(value), floor, width, label, wrong, f"{value:.0e}" if value else "0")
    if limit:
        shapes.append(_line(y(limit), width, f'stroke="{WRONG}" stroke-width="1.5" stroke-dasharray="6 4"'))
        shapes.append(_text(width - 2, y(limit) - 4, f"limit {limit:.0e}", "end"))
    return _svg(shapes, width, height)


def share_bars(values: Mapping[str, float], width: int = 1000, height: int = 200) -> str:
    """A bar for each name from 0 to 100 %."""
    floor = height - _BOTTOM
    shapes = [_grid(floor - share * (floor - _TOP), f"{share:.0%}", width) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for i, (name, value) in enumerate(values.items()):
        at = floor - value * (floor - _TOP)
        shapes += _bar(i, len(values), name, at, floor, width, f"{name}: {value:.1%}", False, f"{value:.1%}")
    return _svg(shapes, width, height)


def line_plot(
    values: Sequence[float],
    marked: Sequence[bool],
    unit: str,
    below: str,
    borders: Sequence[int] = (),
    width: int = 1000,
    height: int = 200,
) -> str:
    """One value after another from 0 to the largest; marked ones are orange crosses, `borders` thin upright lines.

    `unit` names the upright axis, `below` the other one. Values that are not finite are drawn at the top.
    """
    floor = height - _BOTTOM
    finite = [value for value in values if math.isfinite(value)]
    most = max(finite, default=0.0) or 1.0
    step = (width - _LEFT) / max(len(values), 1)

    def place(index: int, value: float) -> tuple[float, float]:
        share = min(value / most, 1.0) if math.isfinite(value) else 1.0
        return _LEFT + (index + 0.5) * step, floor - share * (floor - _TOP)

    shapes = [_grid(floor - share * (floor - _TOP), f"{share * most:.2g}", width) for share in (0.0, 0.5, 1.0)]
    shapes.append(_title(unit, floor))
    for border in borders:
        x = _LEFT + border * step
        shapes.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{floor}" stroke="#999" stroke-dasharray="2 3"/>'
        )
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(i, value) for i, value in enumerate(values)))
    shapes.append(f'<polyline points="{path}" fill="none" stroke="{RIGHT}" stroke-width="1.5"/>')
    shapes += [_cross(*place(i, values[i])) for i, mark in enumerate(marked) if mark]
    shapes.append(_text((_LEFT + width) / 2, height - 6, below, "middle"))
    return _svg(shapes, width, height)


def _bar(
    index: int, count: int, name: str, y: float, floor: float, width: int, label: str, wrong: bool, value: str
) -> list[str]:
    step = (width - _LEFT) / count
    thick = min(step * 0.8, _WIDEST)
    x = _LEFT + (index + 0.5) * step - thick / 2
    shapes = [
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{thick:.1f}" height="{max(floor - y, 1):.1f}" '
        f'fill="{WRONG if wrong else RIGHT}"><title>{escape(label)}</title></rect>'
    ]
    if wrong:
        shapes.append(_cross(x + thick / 2, y - 7))
    short = name.removeprefix("layer ") if count > _FEW else name
    if count <= _FEW or index % (count // _FEW + 1) == 0 or wrong:
        shapes.append(_text(x + thick / 2, floor + 14, short, "middle"))
    if count <= _FEW // 2:
        shapes.append(_text(x + thick / 2, floor + 28, value, "middle"))
    return shapes


def _svg(shapes: Sequence[str], width: int, height: int) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(shapes)}</svg>'


def _line(y: float, width: int, style: str) -> str:
    return f'<line x1="{_LEFT}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" {style}/>'


def _grid(y: float, label: str, width: int) -> str:
    return _line(y, width, 'stroke="#ddd"') + _text(_LEFT - 6, y + 4, label, "end")


def _title(text: str, floor: float) -> str:
    y = (_TOP + floor) / 2
    return f'<text x="12" y="{y:.1f}" text-anchor="middle" transform="rotate(-90 12 {y:.1f})">{escape(text)}</text>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _cross(x: float, y: float) -> str:
    lines = f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"
    return f'<path d="{lines}" stroke="{WRONG}" stroke-width="2.5" fill="none"/>'
