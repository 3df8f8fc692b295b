"""Measuring the packer: both ways move the same bytes, and nothing is left behind."""

import statistics

import pytest

from angelforge.errors import AngelForgeError
from angelforge.exporter import measure
from angelforge.exporter.measure import PackingFigures, measure_packing, peak_memory
from angelforge.exporter.synthetic import small_config


def test_a_measurement_tells_rates_and_memory_and_cleans_up(tmp_path, monkeypatch):
    """With a small model; the size asked for decides the number of layers."""
    monkeypatch.setattr(measure, "_SHAPE", small_config())
    figures = measure_packing(tmp_path / "new", 5_000_000, rounds=2)
    assert 4_000_000 < figures.nbytes < 6_000_000
    assert len(figures.copy_rates) == len(figures.pack_rates) == 2
    assert min(*figures.copy_rates, *figures.pack_rates) > 0
    assert figures.ratio == statistics.median(figures.pack_rates) / statistics.median(figures.copy_rates)
    assert 10e6 < figures.peak_rss < 1e9
    assert list((tmp_path / "new").iterdir()) == []


def test_a_failed_packing_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_SHAPE", small_config())
    monkeypatch.setattr(measure.sys, "executable", "false")
    with pytest.raises(AngelForgeError, match="Packing failed"):
        measure_packing(tmp_path, 5_000_000, rounds=1)
    assert list(tmp_path.iterdir()) == []


def test_the_ratio_is_that_of_the_medians():
    assert PackingFigures(1, (1.0, 2.0, 9.0), (3.0, 1.0, 4.0), 0).ratio == 1.5


def test_peak_memory_counts_bytes():
    """It rises by what is allocated and touched."""
    before = peak_memory()
    block = bytearray(b"x") * (before + (64 << 20))
    assert peak_memory() >= len(block)
