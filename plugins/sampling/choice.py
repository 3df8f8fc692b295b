"""The token that each row gives: temperature, top-k, top-p and min-p, and a draw; a program a row, nothing is sorted.

The rules and their order are those of `runtime/distribution.py`: the token is the first id, rising, at which the
running sum of what is kept exceeds uniform · total.
"""

import triton
import triton.language as tl

from angelforge.plugins.device.ordering import INFINITY, MINUS_INFINITY, NO_KEY, float_key, key_float
from angelforge.plugins.sampling.rows import (
    CANDIDATES,
    GROUP,
    count_limit,
    divisor_of,
    group_limit,
    list_candidates,
    load_logits,
    logit_key,
    mask_row,
    mass_from,
    mass_limit,
    weights_of,
)

FEW_GROUPS = tl.constexpr(256)  # whose candidates top-p looks at first; then at four times as many; then at the row


@triton.jit
def _first_largest(row, keys, peak_key, mask, vocab: tl.constexpr, words: tl.constexpr):
    """The lowest id of the largest logit."""
    group = tl.arange(0, keys.shape[0])
    token = tl.min(tl.where(keys == peak_key, group, keys.shape[0])) * GROUP + tl.arange(0, GROUP)
    key = logit_key(load_logits(row, token, token < vocab, mask, words))
    return tl.min(tl.where(key == peak_key, token, vocab))


@triton.jit
def _draw_any(row, masses, mask, share, peak, divisor, vocab: tl.constexpr, words: tl.constexpr):
    """From the whole row: the group by the groups' `masses` f64 [width], then the id in it; `share` in [0, 1)."""
    group = tl.arange(0, masses.shape[0])
    sums = tl.cumsum(masses, 0)
    target = share * tl.max(sums)
    last = tl.max(tl.where(masses > 0, group, 0))  # if a parallel sum passes the mark, by a rounding, behind it
    chosen = tl.min(tl.where((sums > target) & (masses > 0), group, last))
    before = tl.max(tl.where(group < chosen, sums, 0.0))
    own = tl.sum(tl.where(group == chosen, masses, 0.0))
    inside = tl.minimum(tl.maximum((target - before) / own, 0.0), 1.0 - 2.0**-53)
    token = chosen * GROUP + tl.arange(0, GROUP)
    weight = weights_of(load_logits(row, token, token < vocab, mask, words), peak, divisor).to(tl.float64)
    running = tl.cumsum(weight, 0)
    last = tl.max(tl.where(weight > 0, token, 0))
    return tl.min(tl.where((running > inside * tl.max(running)) & (weight > 0), token, last))


@triton.jit
def _kept(source, token, length, mask, top, nucleus, ties, seen, min_p, peak, divisor, words: tl.constexpr):
    """(weights f64 of what can come among some of a source's logits, ties seen so far): of the key `nucleus` `ties`."""
    x = load_logits(source, token, token < length, mask, words)
    key = logit_key(x)
    weight = weights_of(x, peak, divisor).to(tl.float64)
    tie = (key == nucleus) & (token < length)
    rank = seen + tl.cumsum(tie.to(tl.int32), 0)
    kept = (key >= top) & ((key > nucleus) | (tie & (rank <= ties))) & (weight >= min_p)
    return tl.where(kept, weight, 0.0), seen + tl.sum(tie.to(tl.int32))


@triton.jit
def _draw(source, length, mask, top, nucleus, ties, min_p, share, peak, divisor, words: tl.constexpr):
    """Where in a source the running sum of what is kept exceeds its share of the whole."""
    total = (peak * 0).to(tl.float64)
    seen = length * 0
    for begin in range(0, length, CANDIDATES):
        token = begin + tl.arange(0, CANDIDATES)
        weight, seen = _kept(source, token, length, mask, top, nucleus, ties, seen, min_p, peak, divisor, words)
        total += tl.max(tl.cumsum(weight, 0))
    target = share * total
    before = total * 0
    seen = length * 0
    chosen = length
    last = length * 0  # if a parallel sum passes the mark, by a rounding, behind it
    for begin in range(0, length, CANDIDATES):
        token = begin + tl.arange(0, CANDIDATES)
        weight, seen = _kept(source, token, length, mask, top, nucleus, ties, seen, min_p, peak, divisor, words)
        running = before + tl.cumsum(weight, 0)
        chosen = tl.minimum(chosen, tl.min(tl.where((running > target) & (weight > 0), token, length)))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, token, 0)))
        before = before + tl.max(tl.cumsum(weight, 0))
    return tl.where(chosen < length, chosen, last)


@triton.jit
def _ties_needed(source, length, mask, nucleus, wanted, peak, divisor, words: tl.constexpr):
    """How many of the logits at the nucleus' end it takes to hold `wanted`, at least one."""
    above = mass_from(source, length, mask, nucleus + 1, peak, divisor, words)
    each = tl.maximum(weights_of(key_float(nucleus), peak, divisor).to(tl.float64), 1e-300)
    count = tl.maximum(tl.ceil((wanted - above) / each), 1.0)
    count += tl.where(above + count * each < wanted, 1.0, 0.0)  # the division may round across a whole number
    count -= tl.where((count > 1) & (above + (count - 1) * each >= wanted), 1.0, 0.0)
    return tl.minimum(count, 2147483647.0).to(tl.int32)


@triton.jit
def _list_enough(
    row, key, peak_key, mask, wanted, by_mass, enough, min_p, divisor, own_groups, own_values, own_ids,
    vocab: tl.constexpr, words: tl.constexpr,
):  # fmt: skip
    """(how many candidates are listed, the key that none is below); more than 2,048: they do not decide.

    All that rules keep is among the candidates of `wanted` groups, or with `by_mass` (top-p alone) if those weigh
    `enough`, else perhaps among those of more groups. With 0 groups, what min-p alone may keep is listed.
    """
    groups: tl.constexpr = (vocab + GROUP - 1) // GROUP
    peak = key_float(peak_key)
    size = CANDIDATES + 1 + wanted * 0
    least = NO_KEY + wanted * 0
    listing = wanted <= groups
    while listing:
        if wanted > 0:
            least = group_limit(key, wanted, peak_key)
        else:
            slack = divisor * 1e-3 + 1e-6 * tl.abs(peak)
            least = float_key(peak + divisor * tl.log(min_p.to(tl.float32)) * 1.0001 - slack)
        least = tl.maximum(least, MINUS_INFINITY + 1)
        size = list_candidates(row, key, least, mask, own_groups, own_values, own_ids, vocab, words)
        listing = by_mass & (size <= CANDIDATES)
        if listing:
            listing = mass_from(own_values, size, mask, least, peak, divisor, 0) < enough
        if listing:
            wanted *= 4
            size = CANDIDATES + 1
            listing = (wanted <= groups) & (wanted <= 4 * FEW_GROUPS)
    return size, least


@triton.jit
def _limits(source, length, mask, top_k, top_p, everything, least, peak_key, divisor, words: tl.constexpr):
    """(key of the k-th largest, key at the nucleus' end, how many logits of that key are in it).

    `everything` is the sum of the row's weights, `least` a key that the limits are not below.
    """
    peak = key_float(peak_key)
    top = NO_KEY + length * 0
    if top_k > 0:
        top = count_limit(source, length, mask, top_k, least, peak_key, words)
        everything = mass_from(source, length, mask, top, peak, divisor, words)
    nucleus = NO_KEY + length * 0
    ties = length * 0
    if top_p < 1:
        enough = top_p * everything
        nucleus = mass_limit(source, length, mask, enough, tl.maximum(top, least), peak_key, peak, divisor, words)
        ties = _ties_needed(source, length, mask, nucleus, enough, peak, divisor, words)
    return top, nucleus, ties


@triton.jit
def _draw_by_rules(
    row, key, everything, peak_key, mask, top_k, top_p, min_p, share, divisor, own_groups, own_values, own_ids,
    vocab: tl.constexpr, words: tl.constexpr,
):  # fmt: skip
    """The id of a row with at least one rule, from its candidates or, where they do not decide, from all of it."""
    by_mass = (top_k <= 0) & (top_p < 1)
    wanted = tl.where(by_mass, FEW_GROUPS, top_k)
    size, least = _list_enough(
        row, key, peak_key, mask, wanted, by_mass, top_p * everything, min_p, divisor,
        own_groups, own_values, own_ids, vocab, words,
    )  # fmt: skip
    listed = size <= CANDIDATES
    least = tl.where(listed, least, MINUS_INFINITY + 1)
    length = tl.where(listed, size, vocab)
    source = tl.where(listed, own_values.to(tl.int64), row.to(tl.int64)).to(tl.pointer_type(tl.float32))
    if words > 0:  # what is not allowed is not listed
        mask = tl.where(listed, 0, mask)
    top, nucleus, ties = _limits(source, length, mask, top_k, top_p, everything, least, peak_key, divisor, words)
    peak = key_float(peak_key)
    at = _draw(source, length, mask, top, nucleus, ties, min_p, share, peak, divisor, words)
    if listed:
        at = tl.load(own_ids + at)
    return at


@triton.jit
def choose_tokens(
    logits,  # f32 [R, vocab]
    rows,  # int64 [n]
    rules,  # f64 [n, 4]: temperature, top-k, top-p, min-p
    uniform,  # f64 [n] in [0, 1)
    mask_of,  # int32 [n]
    masks,  # int32 [m, words]
    keys,  # int32 [n, groups], of `group_rows`
    sums,  # f32 [n, groups], of `group_rows`
    groups_listed,  # int32 [n, groups], this kernel's own, as the next two
    values,  # f32 [n, CANDIDATES]
    ids,  # int32 [n, CANDIDATES]
    chosen,  # → int64 [n]; −1 where nothing can come
    vocab: tl.constexpr,
    words: tl.constexpr,
    width: tl.constexpr,  # a power of two ≥ groups
):
    """Grid (n)."""
    groups: tl.constexpr = (vocab + GROUP - 1) // GROUP
    place = tl.program_id(0).to(tl.int64)
    row = logits + tl.load(rows + place) * vocab
    mask = mask_row(masks, mask_of, place, words)
    group = tl.arange(0, width)
    key = tl.load(keys + place * groups + group, group < groups, NO_KEY)
    peak_key = tl.max(key)
    if (peak_key >= INFINITY) | (peak_key <= MINUS_INFINITY):
        tl.store(chosen + place, -1)
        return
    temperature = tl.load(rules + place * 4)
    if temperature <= 0:
        tl.store(chosen + place, _first_largest(row, key, peak_key, mask, vocab, words).to(tl.int64))
        return
    top_k = tl.load(rules + place * 4 + 1)
    top_k = tl.where(top_k < vocab, top_k, 0).to(tl.int32)
    top_p = tl.load(rules + place * 4 + 2)
    min_p = tl.load(rules + place * 4 + 3)
    share = tl.load(uniform + place)
    peak = key_float(peak_key)
    divisor = divisor_of(temperature)
    weight = tl.load(sums + place * groups + group, group < groups, 0.0)
    masses = (weight * tl.where(group < groups, weights_of(key_float(key), peak, divisor), 0.0)).to(tl.float64)
    if (top_k <= 0) & (top_p >= 1) & (min_p <= 0):
        tl.store(chosen + place, _draw_any(row, masses, mask, share, peak, divisor, vocab, words).to(tl.int64))
        return

    at = _draw_by_rules(
        row, key, tl.sum(masses), peak_key, mask, top_k, top_p, min_p, share, divisor,
        groups_listed + place * groups, values + place * CANDIDATES, ids + place * CANDIDATES, vocab, words,
    )  # fmt: skip
    tl.store(chosen + place, at.to(tl.int64))
