"""`angelforge bench`: the figures that the project promises, with room for a busy machine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.built import make_bundle

from angelforge.exporter.export import ExportOptions
from angelforge.precision import Precision


def bench(*arguments: object) -> Any:
    """What `angelforge bench … --json` prints; in a process of its own, whose memory is its own."""
    command = [sys.executable, "-m", "angelforge.tools", "bench", *map(str, arguments), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(("options", "tensors"), [((), 24161), (("--fp8",), 48129)])
def test_the_full_shape_is_checked_in_little_memory(options: tuple[str, ...], tensors: int) -> None:
    """All headers and the plan within 500 MB and 10 s (0.3 s on an idle machine)."""
    found = bench("headers", *options)
    assert found["tensors"] == tensors
    assert found["peak_rss"] < 500e6
    assert found["seconds"]["header check"] + found["seconds"]["plan"] < 10
    assert found["seconds"]["graph of all layers"] < 2


def test_steps_are_timed(tmp_path: Path) -> None:
    """A prefill and a decode step of a small f32 bundle; their promise stands in the longer test."""
    bundle = make_bundle(tmp_path, options=ExportOptions(precision=Precision.FP32))[1]
    prefill, decode = bench("step", bundle.folder, "--rounds", 5)
    assert (prefill["call"], decode["call"]) == ("prefill of 96 tokens", "decode at 96 tokens")
    assert 0 < prefill["least"] <= prefill["median"]
    assert 0 < decode["least"] <= decode["median"]


@pytest.mark.full
def test_steps_are_fast(tmp_path: Path) -> None:
    """At most 16 ms for 96 tokens and 2 ms for one on two idle cores; here the fastest call, and half as much again."""
    bundle = make_bundle(tmp_path, options=ExportOptions(precision=Precision.FP32))[1]
    prefill, decode = bench("step", bundle.folder, "--rounds", 100)
    assert prefill["least"] < 1.5 * 16
    assert decode["least"] < 1.5 * 2


@pytest.mark.full
@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.8), ("fp8", 0.35)])
def test_packing_keeps_up_with_copying(tmp_path: Path, precision: str, least: float) -> None:
    """Rates side by side in one run, with room for noise; memory far below 1 GB."""
    (row,) = bench("pack", "--size", 0.74, "--precision", precision, "--folder", tmp_path)
    assert row["ratio"] > least / 2
    assert row["peak_rss"] < 1e9
