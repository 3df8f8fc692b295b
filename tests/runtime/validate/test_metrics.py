"""Figures of comparisons, by hand."""

import numpy as np
import pytest

from angelforge.runtime.validate.metrics import Worst, difference, logit_rows


def test_difference_by_hand() -> None:
    expected, found = np.array([[1.0, -4.0], [0.0, 2.0]]), np.array([[1.0, -3.0], [0.5, 2.0]])
    result = difference(found, expected)
    assert (result.max_error, result.relative_error, result.differing) == (1.0, 0.25, 0.5)
    assert result.worst == (Worst((0, 1), -4.0, -3.0), Worst((1, 0), 0.0, 0.5))
    assert result.cosine == pytest.approx((1 + 12 + 4) / np.sqrt(21 * 14.25))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_an_infinite_error(value: float) -> None:
    """On one side; the same on both sides is no difference."""
    assert difference(np.array([1.0, value]), np.array([1.0, 2.0])).relative_error == np.inf
    assert difference(np.array([1.0, 2.0]), np.array([1.0, value])).max_error == np.inf
    assert difference(np.array([1.0, value]), np.array([1.0, value])).max_error == 0


def test_other_shapes_and_zeros() -> None:
    assert difference(np.zeros((2, 3)), np.zeros((3, 2))).relative_error == np.inf
    assert difference(np.zeros(3), np.zeros(3)).relative_error == 0
    assert difference(np.ones(3), np.zeros(3)).relative_error == np.inf
    assert difference(np.zeros((0, 4)), np.zeros((0, 4))).max_error == 0


def test_logits_by_hand() -> None:
    """Shifted logits are the same prediction; a swapped pair of the two best is seen in KL and top-1, not in top-5."""
    expected = np.log(np.array([[0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125]] * 2))
    found = expected.copy()
    found[0] += 3
    found[1, [0, 1]] = found[1, [1, 0]]
    same, swapped = logit_rows(found, expected, ((0, 7), (1, 0)))
    assert (same.sequence, same.position, same.top1, same.top5) == (0, 7, True, 1.0)
    assert same.kl == pytest.approx(0, abs=1e-15)
    assert swapped.kl == pytest.approx(0.25 * np.log(2))
    assert not swapped.top1
