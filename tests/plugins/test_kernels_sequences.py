"""Which sequences are left in parts: rows of `partial` are given out up to its capacity and never behind it."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from support.interpreter import exact_interpreter

from angelforge.plugins.device.sequences import part_rows

SPLIT, QUERIES, CHUNK = 32, 4, 4
CAPACITY = 12  # three sequences of one token and 128 keys


@triton.jit
def _part_rows(
    count, length, first, wanted, taken, capacity, chunk: tl.constexpr, split: tl.constexpr, queries: tl.constexpr
):
    index = tl.arange(0, chunk)
    first_row, rows = part_rows(tl.load(count + index), tl.load(length + index), taken, capacity, split, queries)
    tl.store(first + index, first_row)
    tl.store(wanted + index, rows)


def rows_of(counts: list[int], parts: list[int], taken: int) -> tuple[list[int], list[int]]:
    """(first rows, rows wanted) of sequences with so many tokens and parts of keys."""
    count, length = (torch.tensor(x, dtype=torch.int32) for x in (counts, [n * SPLIT for n in parts]))
    first, wanted = torch.empty(CHUNK, dtype=torch.int32), torch.empty(CHUNK, dtype=torch.int32)
    with exact_interpreter([count, length], [first, wanted]):
        _part_rows[(1,)](count, length, first, wanted, taken, CAPACITY, CHUNK, SPLIT, QUERIES)
    return first.tolist(), wanted.tolist()


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_the_last_row_is_given_out_and_none_behind_it(taken: int) -> None:
    """Wanted are exactly the rows that are left, one more, and far more; by one sequence and by two."""
    left = CAPACITY - taken
    assert rows_of([1, 0, 0, 0], [left, 0, 0, 0], taken) == ([taken, -1, -1, -1], [left, 0, 0, 0])
    assert rows_of([1, 0, 0, 0], [left + 1, 0, 0, 0], taken)[0] == [-1] * 4
    assert rows_of([1, 0, 0, 0], [2**19, 0, 0, 0], taken)[0] == [-1] * 4
    assert rows_of([1, 1, 0, 0], [left - 1, 1, 0, 0], taken)[0] == [taken, CAPACITY - 1, -1, -1]
    assert rows_of([1, 1, 0, 0], [left - 1, 2, 0, 0], taken)[0] == [taken, -1, -1, -1]
    assert rows_of([1, 1, 0, 0], [left, 1, 0, 0], taken)[0] == [taken, -1, -1, -1]


@pytest.mark.parametrize("taken", [CAPACITY, CAPACITY + 1, CAPACITY + 2, 2**26])
def test_nothing_is_given_out_when_all_rows_are_taken(taken: int) -> None:
    """However much more was wanted before."""
    assert rows_of([1, 4, 2, 1], [1, 1, 2, 2**19], taken)[0] == [-1] * 4


def test_any_wish_ends_within_the_capacity() -> None:
    """Random counts and parts around the capacity: rows follow each other without gaps until one does not fit."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        counts, parts = rng.integers(0, QUERIES + 2, CHUNK), rng.integers(0, 5, CHUNK)
        wishes = np.where(counts <= QUERIES, counts * parts, 0)
        first, wanted = rows_of(counts.tolist(), parts.tolist(), 0)
        ends = np.cumsum(wishes)
        fits = (wishes > 0) & (ends <= CAPACITY)
        assert first == np.where(fits, ends - wishes, -1).tolist()
        assert wanted == np.minimum(wishes, CAPACITY + 1).tolist()
