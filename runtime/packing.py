"""Packing: tokens of many sequences become the one `Batch` of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Batch, Int32, Int64


@dataclass(eq=False, slots=True)  # not frozen, which makes it three times as slow to create: there are many a step
class Piece:
    """What one sequence has computed in a step: a chunk of its prompt, one decoded token, or drafted tokens."""

    tokens: Int64  # [n] n ≥ 1
    start: int  # position of the first of them; everything before it is in the cache
    pages: Int32  # [≥ ⌈(start + n) / page_size⌉] physical pages of the sequence
    logits: int  # logits are needed of the last so many tokens


@dataclass(frozen=True)
class Padding:
    """The fixed sizes that a step is padded to, so that steps of a bucket have one shape (CUDA graphs need that)."""

    tokens: int  # T
    sequences: int  # B
    pages: int  # P, columns of the page table
    rows: int  # R, rows of logits


def pack(pieces: Sequence[Piece], page_size: int, padding: Padding | None = None) -> Batch:
    """Packs the pieces in their order; the rows of logits are in the same order.

    With `padding` the batch has exactly its sizes: extra tokens are id 0 at position 0 writing to page 0, extra
    sequences are empty, extra logit rows repeat row 0 and are to be ignored. Raises AngelForgeError if the pieces need
    more than that.
    """
    tokens = sum(piece.tokens.shape[0] for piece in pieces)
    widest = max((-(-(piece.start + piece.tokens.shape[0]) // page_size) for piece in pieces), default=0)
    needed = Padding(tokens, len(pieces), widest, sum(piece.logits for piece in pieces))
    size = _padded(needed, padding)
    input_ids = np.zeros(size.tokens, np.int64)
    positions = np.zeros(size.tokens, np.int32)
    query_start = np.full(size.sequences + 1, tokens, np.int32)
    kv_length = np.zeros(size.sequences, np.int32)
    page_table = np.zeros((size.sequences, size.pages), np.int32)
    slots = np.zeros(size.tokens, np.int32)
    logit_indices = np.zeros(size.rows, np.int64)
    begin = row = 0
    for index, piece in enumerate(pieces):
        end, pages = begin + piece.tokens.shape[0], piece.pages
        stop = piece.start + end - begin
        query_start[index] = begin
        kv_length[index] = stop
        used = -(-stop // page_size)
        page_table[index, :used] = pages[:used]
        input_ids[begin:end] = piece.tokens
        if end - begin == 1:  # a decode step is made of these: scalars cost a third of the array expressions below
            positions[begin] = piece.start
            slots[begin] = pages[used - 1] * page_size + piece.start % page_size
        else:
            places = np.arange(piece.start, stop, dtype=np.int32)
            positions[begin:end] = places
            slots[begin:end] = pages[places // page_size] * page_size + places % page_size
        if piece.logits == 1:
            logit_indices[row] = end - 1
        else:
            logit_indices[row : row + piece.logits] = np.arange(end - piece.logits, end)
        begin, row = end, row + piece.logits
    if size.tokens > tokens:  # spread over page 0: where the page is large enough, no two rows write one slot
        slots[tokens:] = np.arange(size.tokens - tokens, dtype=np.int32) % page_size
    num_tokens = np.array([tokens], np.int32)
    return Batch(input_ids, positions, num_tokens, query_start, kv_length, page_table, slots, logit_indices)


def _padded(needed: Padding, padding: Padding | None) -> Padding:
    if padding is None:
        return needed
    for name in ("tokens", "sequences", "pages", "rows"):
        if getattr(needed, name) > getattr(padding, name):
            raise AngelForgeError(
                f"A step needs {getattr(needed, name)} {name}, but its padded size has {getattr(padding, name)}: "
                "choose a larger bucket."
            )
    return padding
