"""What the kernels of this folder share: rows of logits in groups of 32 ids, and searches for limits in a row.

The largest of each group is known first (`groups.py`). The k-th largest of them bounds the k-th largest logit from
below, for k groups hold one that is not smaller; and what is not below it lies in the groups whose largest is not. So a
few groups are read again instead of the row, and a limit is found among a few candidates by bisection over keys
(`device/ordering.py`), which is exact and sorts nothing.
"""

import triton
import triton.language as tl

from angelforge.plugins.device.ordering import NO_KEY, float_key

GROUP = tl.constexpr(32)  # ids; one word of a mask
CANDIDATES = tl.constexpr(2048)  # that are listed at most, and read in one go; rows with more are searched as a whole
LISTED_GROUPS = tl.constexpr(64)  # that are read at once to list candidates
WAYS = tl.constexpr(8)  # in which a search among candidates parts what is left, at the cost of one pass
SMALLEST_DIVISOR = tl.constexpr(1e-30)  # a temperature; as in runtime/distribution.py, as the next
LARGEST_DIVISOR = tl.constexpr(1e30)


@triton.jit
def load_logits(row, token, there, mask, words: tl.constexpr):
    """f32 logits at ids of a row, −inf where they are not `there` or not allowed.

    `words` is how many words of 32 ids each a mask has, 0 for no masks; `mask` is the int64 address of this row's, 0
    for none.
    """
    x = tl.load(row + token, there, float("-inf"))
    if words > 0:
        limited = mask != 0
        word = tl.load(mask.to(tl.pointer_type(tl.int32)) + token // 32, there & limited & (token // 32 < words), 0)
        x = tl.where(limited & (((word >> (token % 32)) & 1) == 0), float("-inf"), x)
    return x


@triton.jit
def mask_row(masks, mask_of, place, words: tl.constexpr):
    """The int64 address of the mask of a place; 0 where it has none."""
    address = place * 0
    if words > 0:
        number = tl.load(mask_of + place).to(tl.int64)
        address = tl.where(number >= 0, (masks + number * words).to(tl.int64), 0)
    return address


@triton.jit
def logit_key(x):
    """`float_key` with NaN above all numbers."""
    return tl.where(x != x, 0x7FFFFFFF, float_key(x))


@triton.jit
def divisor_of(temperature):
    """f32: what distances between logits are divided by."""
    return tl.minimum(tl.maximum(temperature, SMALLEST_DIVISOR), LARGEST_DIVISOR).to(tl.float32)


@triton.jit
def weights_of(x, peak, divisor):
    """exp((x − peak) / divisor), at most 1; 0 for −inf."""
    return tl.where(x == float("-inf"), 0.0, tl.exp((x - peak) / divisor))


@triton.jit
def middle(low, high):
    """Of two keys int32, rounded up; their distance may take 32 bits."""
    return (low + ((high.to(tl.int64) - low.to(tl.int64) + 1) >> 1)).to(tl.int32)


@triton.jit
def group_limit(keys, wanted, peak_key):
    """int32: the largest key with `wanted` of the groups' `keys` not below it; there must be so many groups."""
    low, high = tl.min(tl.where(keys == NO_KEY, peak_key, keys)), peak_key
    while low < high:
        mid = middle(low, high)
        enough = tl.sum((keys >= mid).to(tl.int32)) >= wanted
        low = tl.where(enough, mid, low)
        high = tl.where(enough, high, mid - 1)
    return low


@triton.jit
def list_candidates(row, keys, limit, mask, groups_listed, values, ids, vocab: tl.constexpr, words: tl.constexpr):
    """How many logits of a row are not below the key `limit`; the first 2,048 of them, by id, at `values` and `ids`.

    `keys` int32 [width] are the largest of its groups; `groups_listed` int32 [groups] is for the program's own use.
    """
    group = tl.arange(0, keys.shape[0])
    chosen = (keys >= limit) & (keys != NO_KEY)
    tl.store(groups_listed + tl.cumsum(chosen.to(tl.int32), 0) - 1, group, chosen)
    count = tl.sum(chosen.to(tl.int32))
    tl.debug_barrier()
    size = count * 0
    for begin in range(0, count, LISTED_GROUPS):
        place = begin + tl.arange(0, LISTED_GROUPS)
        own = tl.load(groups_listed + place, (place < count) & (size <= CANDIDATES), vocab)
        token = tl.reshape(own[:, None] * GROUP + tl.arange(0, GROUP)[None, :], (LISTED_GROUPS * GROUP,))
        there = token < vocab
        x = load_logits(row, token, there, mask, words)
        found = there & (logit_key(x) >= limit)
        at = size + tl.cumsum(found.to(tl.int32), 0) - 1
        tl.store(values + at, x, found & (at < CANDIDATES))
        tl.store(ids + at, token, found & (at < CANDIDATES))
        size += tl.sum(found.to(tl.int32))
    tl.debug_barrier()
    return size


@triton.jit
def count_from(source, length, least):
    """How many of the `length` logits at `source` have a key of at least `least`."""
    found = length * 0
    for begin in range(0, length, CANDIDATES):
        token = begin + tl.arange(0, CANDIDATES)
        key = logit_key(load_logits(source, token, token < length, 0, 0))
        found += tl.sum(((key >= least) & (token < length)).to(tl.int32))
    return found


@triton.jit
def mass_from(source, length, mask, least, peak, divisor, words: tl.constexpr):
    """The weights of those together, f64; of what `mask` allows."""
    found = (peak * 0).to(tl.float64)
    for begin in range(0, length, CANDIDATES):
        token = begin + tl.arange(0, CANDIDATES)
        x = load_logits(source, token, token < length, mask, words)
        weight = weights_of(x, peak, divisor)
        found += tl.sum(tl.where(logit_key(x) >= least, weight, 0.0)).to(tl.float64)
    return found


@triton.jit
def _mark(low, high, number):
    """The `number`-th of eight keys that part (low, high] evenly; the eighth is `high`."""
    span = high.to(tl.int64) - low.to(tl.int64)
    return (low + ((span * number + (WAYS - 1)) // WAYS)).to(tl.int32)


@triton.jit
def _narrowed(low, high, enough):
    """What is left of [low, high] where the first `enough` of the eight keys have enough that is not below them."""
    below, above = _mark(low, high, enough), _mark(low, high, enough + 1) - 1
    return tl.where(enough > 0, below, low), tl.where(enough < WAYS, above, high)


@triton.jit
def count_limit(source, length, mask, wanted, least, most, words: tl.constexpr):
    """int32: the largest key in [least, most] with `wanted` logits not below it, or `least`."""
    low, high = least, most
    while low < high:
        marks = _mark(low, high, tl.arange(0, WAYS) + 1)[None, :]
        found = tl.zeros((WAYS,), tl.int32)
        for begin in range(0, length, CANDIDATES):
            token = begin + tl.arange(0, CANDIDATES)
            key = logit_key(load_logits(source, token, token < length, mask, words))
            key = tl.where(token < length, key, NO_KEY)[:, None]
            found += tl.sum((key >= marks).to(tl.int32), 0)
        low, high = _narrowed(low, high, tl.sum((found >= wanted).to(tl.int32)))
    return low


@triton.jit
def mass_limit(source, length, mask, wanted, least, most, peak, divisor, words: tl.constexpr):
    """int32: the largest key in [least, most] with logits that weigh `wanted` not below it, or `least`."""
    low, high = least, most
    while low < high:
        marks = _mark(low, high, tl.arange(0, WAYS) + 1)[None, :]
        found = tl.zeros((WAYS,), tl.float64)
        for begin in range(0, length, CANDIDATES):
            token = begin + tl.arange(0, CANDIDATES)
            x = load_logits(source, token, token < length, mask, words)
            weight = weights_of(x, peak, divisor)[:, None]
            found += tl.sum(tl.where(logit_key(x)[:, None] >= marks, weight, 0.0), 0).to(tl.float64)
        low, high = _narrowed(low, high, tl.sum((found >= wanted).to(tl.int32)))
    return low
