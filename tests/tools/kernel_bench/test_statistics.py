"""Medians, means, and how many launches and copies a measurement takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from angelforge.tools.kernel_bench.statistics import (
    L2_BYTES,
    MOST_COPIES,
    copies_for,
    geometric_mean,
    rounds_for,
    summarise,
)

positive = st.floats(1e-3, 1e6)


@given(st.lists(positive, min_size=1, max_size=20))
def test_summary_lies_within_the_measurements(times: list[float]) -> None:
    found = summarise(times)
    assert min(times) == found.least <= found.median <= max(times)
    assert found.spread >= 0


def test_one_outlier_does_not_move_the_median() -> None:
    assert summarise([10.0, 11.0, 12.0, 500.0, 10.5]).median == 11.0
    assert summarise([4.0, 6.0]).spread == pytest.approx(0.4)
    with pytest.raises(ValueError, match="nothing was measured"):
        summarise([])


@given(st.lists(positive, min_size=1, max_size=5), st.floats(0.1, 10))
def test_geometric_mean_scales(values: list[float], factor: float) -> None:
    """Twice as slow in one of n calls counts the same whichever it is."""
    scaled = [values[0] * factor, *values[1:]]
    assert geometric_mean(scaled) == pytest.approx(geometric_mean(values) * factor ** (1 / len(values)))


@given(st.integers(1, 2**40))
def test_rotations_leave_the_cache(nbytes: int) -> None:
    """What is read between two launches on the same inputs is larger than the L2 cache, for all but small calls."""
    copies = copies_for(nbytes)
    assert 1 <= copies <= MOST_COPIES
    assert nbytes < 2**21 or nbytes * copies >= 2 * L2_BYTES


@given(positive, st.integers(1, 64))
def test_rounds_fill_some_milliseconds(microseconds: float, calls: int) -> None:
    rounds = rounds_for(microseconds, calls)
    assert rounds >= 1
    assert rounds == 1 or rounds * calls <= 1000
    assert rounds * calls * microseconds >= 2500 or (rounds + 1) * calls > 1000 or rounds == 1
