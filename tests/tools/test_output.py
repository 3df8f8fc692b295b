"""Numbers to read, tables whose rows stay whole in a pipe, progress that keeps the output clean."""

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from angelforge.tools import output


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (65536, "65.5 kB"), (999_600, "1 MB"), (104.2e9, "104 GB")],
)
def test_format_bytes(count: float, text: str) -> None:
    assert output.format_bytes(count) == text


@given(st.integers(0, 10**16))
def test_format_bytes_keeps_three_digits(count: int) -> None:
    """Whatever the size: the text is within half a percent of it and short."""
    number, unit = output.format_bytes(count).split()
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert abs(float(number) * scale - count) <= 0.005001 * count
    assert len(number) <= 5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.348, "0.35 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert output.format_seconds(seconds) == text


def test_table_rows_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """In a pipe a long row is one line, and brackets in a name are printed, not taken as markup."""
    name = "model.layers.0." + "x" * 150
    output.print_table(["name", "shape"], [[name, "[red]"]], title="Tensors")
    lines = capsys.readouterr().out.splitlines()
    assert any(name in line and "[red]" in line for line in lines)


def test_json_keeps_text(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"text": "头痛"})
    assert "头痛" in capsys.readouterr().out


def test_progress_in_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where standard error is no terminal: a line every ten seconds with share, rate and time left.

    What was done before the work began does not make it look faster.
    """
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(output, "monotonic", lambda: float(next(clock)))
    with output.total_progress("packing") as report:
        for done in range(20_000, 60_000, 10_000):
            report(done, 100_000)
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "packing: 30 % (30 kB of 100 kB, 1 kB/s, 1 min 10 s left)",
        "packing: 50 % (50 kB of 100 kB, 1.5 kB/s, 33 s left)",
    ]


def test_short_work_says_nothing_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with output.total_progress("packing", unit="tokens") as report:
        report(0, 0)
        report(5, 5)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("unit", ["B", "tokens"])
def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    """On a terminal a bar that ends full, on standard error."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    with output.total_progress("packing", unit) as report:
        for done in (1, 2, 3):
            report(done, 3)
    assert "packing" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
