"""Schedules: every position once, in calls that honour the contract, across chunks and pages."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from angelforge.errors import UsageError
from angelforge.runtime.validate.data import random_sequences, schedule

PAGE, VOCAB, MOST = 8, 50, 60


@given(st.lists(st.integers(1, MOST), min_size=1, max_size=5), st.integers(1, 40), st.integers(0, 4), st.integers(0, 9))
def test_every_position_is_computed_once(lengths: list[int], chunk: int, padding: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, VOCAB, n) for n in lengths]
    planned = schedule(
        sequences, page_size=PAGE, vocab_size=VOCAB, max_context=MOST, chunk=chunk, padding=padding, seed=seed
    )
    seen = []
    for step in planned.steps:
        step.batch.check(VOCAB, PAGE, planned.num_pages, MOST)
        assert len(step.rows) <= chunk
        assert len(step.batch.input_ids) == len(step.rows) + padding
        rows = step.batch.logit_indices[: len(step.rows)]
        for row, (sequence, position) in zip(rows, step.rows, strict=True):
            assert step.batch.input_ids[row] == sequences[sequence][position]
            assert step.batch.positions[row] == position
        seen += step.rows
    assert sorted(seen) == [(s, p) for s, n in enumerate(lengths) for p in range(n)]


@pytest.mark.parametrize(
    ("sequences", "said"),
    [([], "without tokens"), ([[]], "without tokens"), ([[50]], "outside"), ([[1] * 61], "covers")],
)
def test_wrong_tokens_are_refused(sequences: list[list[int]], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        schedule(sequences, page_size=PAGE, vocab_size=VOCAB, max_context=MOST)


def test_random_sequences_are_the_same_every_time() -> None:
    first, second = random_sequences(3, VOCAB, 20, 5), random_sequences(3, VOCAB, 20, 5)
    assert [a.tolist() for a in first] == [b.tolist() for b in second]
    assert all(15 <= len(ids) <= 25 for ids in first)
