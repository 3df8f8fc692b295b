"""The documented table of thresholds is the one in use."""

import re
from dataclasses import fields

from support.sources import ROOT

from angelforge.precision import Precision
from angelforge.runtime.validate.thresholds import BF16, F32, FP8, FP8_IN_F32, Thresholds, thresholds


def test_the_page_shows_the_thresholds() -> None:
    """Every row of docs/validation.md, in the order of the fields."""
    text = (ROOT / "docs/validation.md").read_text(encoding="utf-8").split("## Thresholds")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    shown = [
        [None if cell == "–" else float(cell) for cell in row[1:]] for row in rows if row[0] not in ("---", "engines")
    ]
    names = [field.name for field in fields(Thresholds)]
    assert shown == [[getattr(each, name) for each in (F32, BF16, FP8_IN_F32, FP8)] for name in names]


def test_each_way_to_compute_has_its_own() -> None:
    found = [thresholds(p, stored) for p in Precision for stored in (False, True)]
    assert found == [F32, F32, F32, BF16, FP8_IN_F32, FP8]
