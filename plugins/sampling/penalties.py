"""Penalties on the logits of what was seen, in place: of each id once."""

import triton
import triton.language as tl

TILE = 256  # entries of a history a program


@triton.jit
def _penalized(x, count, repetition, frequency, presence):
    """As `runtime/distribution.py` has it: the repetition penalty of CTRL, then those of OpenAI's API."""
    x = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
    x = x - frequency * count
    return x - tl.where(count > 0, presence, 0.0)


@triton.jit(do_not_specialize=["ahead"])
def penalize_rows(
    logits,  # f32 [R, vocab], changed
    rows,  # int64 [k]
    begins,  # int64 [k]: where in the table each history begins
    sizes,  # int64 [k]
    penalties,  # f32 [k, 3]: repetition, frequency, presence
    ahead_ids,  # int32 [k, ahead]; −1: nothing
    ahead_counts,  # f32 [k, ahead]: these ids count so often, whatever the table says
    table,  # int32 [entries, 2]: id, count
    ahead,
    vocab: tl.constexpr,
    columns: tl.constexpr,  # a power of two ≥ ahead, 0 for none
    tile: tl.constexpr,
):
    """Grid (k, ⌈longest history / tile⌉, at least 1)."""
    place = tl.program_id(0).to(tl.int64)
    row = logits + tl.load(rows + place) * vocab
    repetition = tl.load(penalties + place * 3)
    frequency = tl.load(penalties + place * 3 + 1)
    presence = tl.load(penalties + place * 3 + 2)
    entry = tl.program_id(1) * tile + tl.arange(0, tile)
    known = entry < tl.load(sizes + place)
    at = (tl.load(begins + place) + entry) * 2
    token = tl.load(table + at, known, 0)
    count = tl.load(table + at + 1, known, 0).to(tl.float32)
    if columns > 0:
        column = tl.arange(0, columns)
        proposed = tl.load(ahead_ids + place * ahead + column, column < ahead, -1)
        known = known & (tl.sum((token[:, None] == proposed[None, :]).to(tl.int32), 1) == 0)
        if tl.program_id(1) == 0:
            counts = tl.load(ahead_counts + place * ahead + column, column < ahead, 0.0)
            x = tl.load(row + proposed, proposed >= 0, 0.0)
            tl.store(row + proposed, _penalized(x, counts, repetition, frequency, presence), proposed >= 0)
    x = tl.load(row + token, known, 0.0)
    tl.store(row + token, _penalized(x, count, repetition, frequency, presence), known)
