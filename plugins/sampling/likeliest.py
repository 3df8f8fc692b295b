"""What logprobs need of a row: its sum of weights, the logit of a token, and the few largest logits."""

import triton
import triton.language as tl

from angelforge.plugins.device.ordering import INFINITY, MINUS_INFINITY, NO_KEY, key_float
from angelforge.plugins.sampling.rows import (
    CANDIDATES,
    GROUP,
    count_from,
    count_limit,
    group_limit,
    list_candidates,
    load_logits,
    logit_key,
    weights_of,
)


@triton.jit
def _store_largest(source, length, ids, listed, limit, count, values_out, ids_out):
    """The `count` largest by rising id: all above the key `limit`, and the first of those that have it."""
    ties = count - count_from(source, length, limit + 1)
    seen = length * 0
    stored = length * 0
    for begin in range(0, length, CANDIDATES):
        at = begin + tl.arange(0, CANDIDATES)
        x = load_logits(source, at, at < length, 0, 0)
        key = logit_key(x)
        tie = (key == limit) & (at < length)
        rank = seen + tl.cumsum(tie.to(tl.int32), 0)
        taken = ((key > limit) & (at < length)) | (tie & (rank <= ties))
        place = stored + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(values_out + place, x, taken & (place < count))
        tl.store(ids_out + place, tl.load(ids + at, listed & taken, at), taken & (place < count))
        seen += tl.sum(tie.to(tl.int32))
        stored += tl.sum(taken.to(tl.int32))


@triton.jit(do_not_specialize=["count"])
def measure_rows(
    logits,  # f32 [R, vocab]
    rows,  # int64 [n]
    tokens,  # int64 [n]; −1 for none
    keys,  # int32 [n, groups], of `group_rows` without rules
    sums,  # f32 [n, groups], likewise
    groups_listed,  # int32 [n, groups], this kernel's own, as the next two
    values,  # f32 [n, CANDIDATES]
    ids,  # int32 [n, CANDIDATES]
    count,
    peaks,  # → f32 [n]
    totals,  # → f64 [n]: the sum of exp(x − peak)
    own,  # → f32 [n]: the token's logit, 0 for none
    top_values,  # → f32 [n, count], in the order of rising ids
    top_ids,  # → int32 [n, count]
    vocab: tl.constexpr,
    width: tl.constexpr,  # a power of two ≥ groups
):
    """Grid (n)."""
    groups: tl.constexpr = (vocab + GROUP - 1) // GROUP
    place = tl.program_id(0).to(tl.int64)
    row = logits + tl.load(rows + place) * vocab
    group = tl.arange(0, width)
    key = tl.load(keys + place * groups + group, group < groups, NO_KEY)
    weight = tl.load(sums + place * groups + group, group < groups, 0.0)
    peak_key = tl.max(key)
    peak = key_float(peak_key)
    share = tl.where(group < groups, weights_of(key_float(key), peak, 1.0), 0.0)
    tl.store(peaks + place, peak)
    tl.store(totals + place, tl.sum(weight.to(tl.float64) * share.to(tl.float64)))
    token = tl.load(tokens + place)
    tl.store(own + place, tl.load(row + token, token >= 0, 0.0))
    if (count <= 0) | (peak_key >= INFINITY) | (peak_key <= MINUS_INFINITY):
        return
    least = MINUS_INFINITY + count * 0
    size = CANDIDATES + 1 + count * 0
    own_values = values + place * CANDIDATES
    own_ids = ids + place * CANDIDATES
    if count <= groups:
        least = group_limit(key, count, peak_key)
        size = list_candidates(row, key, least, 0, groups_listed + place * groups, own_values, own_ids, vocab, 0)
    listed = size <= CANDIDATES
    least = tl.where(listed, least, MINUS_INFINITY)
    source = tl.where(listed, own_values.to(tl.int64), row.to(tl.int64)).to(tl.pointer_type(tl.float32))
    length = tl.where(listed, size, vocab)
    limit = count_limit(source, length, 0, count, least, peak_key, 0)
    _store_largest(source, length, own_ids, listed, limit, count, top_values + place * count, top_ids + place * count)
