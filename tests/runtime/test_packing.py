"""Packing keeps the contract of the graph's inputs, and `Batch` refuses what breaks it."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Batch
from angelforge.runtime.packing import Padding, Piece, pack

VOCAB, PAGES, CONTEXT = 50, 200, 64


@st.composite
def packings(draw):
    """(pieces, page size) with disjoint pages."""
    page_size = draw(st.integers(1, 7))
    free = list(draw(st.permutations(range(1, PAGES))))
    pieces = []
    for _ in range(draw(st.integers(1, 4))):
        start, count = draw(st.integers(0, 20)), draw(st.integers(1, 9))
        ids = draw(st.lists(st.integers(0, VOCAB - 1), min_size=count, max_size=count))
        pages = [free.pop() for _ in range(-(-(start + count) // page_size) + draw(st.integers(0, 2)))]
        pieces.append(Piece(np.array(ids), start, np.array(pages, np.int32), draw(st.integers(0, count))))
    return pieces, page_size


@given(packings())
def test_every_token_is_packed_with_its_position_slot_and_sequence(packing):
    pieces, page_size = packing
    batch = pack(pieces, page_size)
    batch.check(VOCAB, page_size, PAGES, CONTEXT)
    rows = [(s, i) for s, piece in enumerate(pieces) for i in range(len(piece.tokens))]
    assert batch.num_tokens.tolist() == [len(rows)] == [len(batch.input_ids)]
    for row, (sequence, i) in enumerate(rows):
        piece = pieces[sequence]
        position = piece.start + i
        assert batch.input_ids[row] == piece.tokens[i]
        assert batch.positions[row] == position
        assert batch.slots[row] == piece.pages[position // page_size] * page_size + position % page_size
        assert batch.query_start[sequence] <= row < batch.query_start[sequence + 1]
    wanted = [row for row, (s, i) in enumerate(rows) if i >= len(pieces[s].tokens) - pieces[s].logits]
    assert batch.logit_indices.tolist() == wanted


@given(packings(), st.tuples(*[st.integers(0, 5)] * 4))
def test_padding_adds_rows_that_write_to_page_0_and_empty_sequences(packing, extra):
    pieces, page_size = packing
    plain = pack(pieces, page_size)
    tokens, sequences, pages, rows = extra
    size = Padding(
        len(plain.input_ids) + tokens,
        len(pieces) + sequences,
        plain.page_table.shape[1] + pages,
        len(plain.logit_indices) + rows,
    )
    padded = pack(pieces, page_size, size)
    padded.check(VOCAB, page_size, PAGES, CONTEXT)
    assert padded.input_ids.shape == (size.tokens,)
    assert padded.page_table.shape == (size.sequences, size.pages)
    assert padded.logit_indices.shape == (size.rows,)
    assert (padded.slots[len(plain.slots) :] < page_size).all()
    assert (np.diff(padded.query_start)[len(pieces) :] == 0).all()
    for name in ("input_ids", "positions", "slots", "logit_indices", "kv_length"):
        original = getattr(plain, name)
        assert (getattr(padded, name)[: len(original)] == original).all()


def test_pieces_that_exceed_the_padded_size_are_an_error():
    piece = Piece(np.zeros(3, np.int64), 0, np.array([1], np.int32), 1)
    with pytest.raises(AngelForgeError, match="needs 3 tokens, but its padded size has 2"):
        pack([piece], 4, Padding(2, 1, 1, 1))


def test_a_batch_of_padding_alone_is_possible():
    pack([], 4, Padding(2, 1, 1, 1)).check(VOCAB, 4, PAGES, CONTEXT)


def batch() -> Batch:
    pages = np.array([3, 5], np.int32)
    other = np.array([7, 8], np.int32)
    return pack([Piece(np.arange(3), 2, pages, 1), Piece(np.arange(2), 0, other, 1)], 4, Padding(6, 3, 2, 2))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input_ids", np.zeros(6, np.int32), r"input_ids is int32\[6\], but int64\[any\]"),
        ("input_ids", np.zeros(0, np.int64), "at least one token"),
        ("positions", np.zeros(5, np.int32), r"positions is int32\[5\], but int32\[6\]"),
        ("slots", [0] * 6, "slots is list, but"),
        ("query_start", np.zeros(3, np.int32), r"query_start is int32\[3\], but int32\[4\]"),
        ("page_table", np.zeros((2, 2), np.int32), r"page_table is int32\[2, 2\], but int32\[3, any\]"),
        ("logit_indices", np.zeros(2, np.int32), r"logit_indices is int32\[2\], but int64\[any\]"),
        ("num_tokens", np.zeros((), np.int32), "num_tokens is"),
    ],
)
def test_wrong_shapes_and_types_are_named(name, value, message):
    with pytest.raises(AngelForgeError, match=message):
        dataclasses.replace(batch(), **{name: value})


@pytest.mark.parametrize(
    ("name", "index", "value", "rule"),
    [
        ("input_ids", 0, VOCAB, "ids of the vocabulary"),
        ("input_ids", 0, -1, "ids of the vocabulary"),
        ("num_tokens", 0, 7, "num_tokens lies within"),
        ("query_start", 1, 6, "query_start rises"),
        ("query_start", 0, 1, "query_start rises"),
        ("kv_length", 2, 1, "empty sequence"),
        ("kv_length", 0, CONTEXT + 1, "fits the context"),
        ("kv_length", 0, 12, "column for every page"),
        ("page_table", (0, 1), 0, "not page 0"),
        ("page_table", (0, 1), PAGES, "pages in use exist"),
        ("positions", 0, 5, "positions lie below"),
        ("positions", 0, 1, "slots agree"),
        ("slots", 1, 13, "slots agree"),
        ("slots", 5, 4, "padding rows write to page 0"),
        ("logit_indices", 0, 6, "packed rows"),
    ],
)
def test_values_that_break_the_contract_are_refused(name, index, value, rule):
    changed = getattr(batch(), name).copy()
    changed[index] = value
    with pytest.raises(AngelForgeError, match=rule):
        dataclasses.replace(batch(), **{name: changed}).check(VOCAB, 4, PAGES, CONTEXT)


def test_two_rows_that_write_one_slot_are_refused():
    page = np.array([3], np.int32)
    twice = pack([Piece(np.zeros(1, np.int64), 0, page, 1)] * 2, 4)
    with pytest.raises(AngelForgeError, match="no two rows"):
        twice.check(VOCAB, 4, PAGES, CONTEXT)
