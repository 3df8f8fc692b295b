"""Plots say what is wrong by a mark, too, and draw every value, whatever it is."""

import math
import re

from angelforge.tools.plots import RIGHT, WRONG, line_plot, log_bars, share_bars
from angelforge.tools.svg import COLOURS


def test_bars_beyond_the_limit_are_marked() -> None:
    """By a colour and a cross; a figure that is no number is beyond every limit; without one nothing is wrong."""
    values = {"layer 0": 1e-6, "layer 1": 0.5, "layer 2": math.nan, "layer <3>": 0.0}
    drawn = log_bars(values, 2e-5)
    assert re.findall(r'<rect [^>]*fill="([^"]+)"', drawn) == [RIGHT, WRONG, WRONG, RIGHT]
    assert drawn.count("<path") == 2
    assert "limit 2e-05" in drawn
    assert "layer &lt;3&gt;: 0.00e+00" in drawn
    assert log_bars(values, None).count(WRONG) == 0
    heights = [float(h) for h in re.findall(r'<rect [^>]*height="([0-9.]+)"', drawn)]
    assert heights[3] < heights[0] < heights[1] < heights[2]


def test_many_bars_have_few_names() -> None:
    """Of 33 layers not every name would fit; of a wrong one it is shown."""
    drawn = log_bars({f"layer {i}": 1.0 if i == 7 else 0.0 for i in range(33)}, 1e-5)
    names = re.findall(r">(\d+)</text>", drawn)
    assert "7" in names
    assert 16 < len(names) < 24
    assert drawn.count("<rect") == 33


def test_lines_show_sequences_and_marks() -> None:
    """A cross for each marked value, a line between sequences, and values that are no numbers at the top."""
    drawn = line_plot([0.0, 2.0, math.inf, 1.0], [False, True, True, False], "KL, nats", "position", [2])
    assert drawn.count("<path") == 2
    assert drawn.count('stroke-dasharray="2 3"') == 1
    points = re.search(r'points="([^"]+)"', drawn)
    assert points is not None
    heights = [float(point.split(",")[1]) for point in points[1].split()]
    assert heights[1] == heights[2] < heights[3] < heights[0]
    assert line_plot([], [], "KL", "position").count("polyline") == 1


def test_shares_and_colours() -> None:
    assert "50.0%" in share_bars({"layer 1": 0.5})
    assert len(set(COLOURS)) == len(COLOURS) >= 12
