"""What is known of each group of 32 logits of a row: its largest, and what it weighs. The one pass over the row."""

import triton
import triton.language as tl

from angelforge.plugins.device.ordering import key_float
from angelforge.plugins.sampling.rows import GROUP, divisor_of, load_logits, logit_key, mask_row, weights_of

TILE = 128  # groups a program


@triton.jit
def group_rows(
    logits,  # f32 [R, vocab]
    rows,  # int64 [n]
    rules,  # f64 [n, 4]; the temperature is the first
    mask_of,  # int32 [n]
    masks,  # int32 [m, words]
    keys,  # → int32 [n, groups]
    sums,  # → f32 [n, groups]: weights relative to the group's largest
    vocab: tl.constexpr,
    words: tl.constexpr,
    tempered: tl.constexpr,
    tile: tl.constexpr,
):
    """Grid (n, ⌈groups / tile⌉)."""
    groups: tl.constexpr = (vocab + GROUP - 1) // GROUP
    place = tl.program_id(0).to(tl.int64)
    row = logits + tl.load(rows + place) * vocab
    group = tl.program_id(1) * tile + tl.arange(0, tile)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = load_logits(row, token, token < vocab, mask_row(masks, mask_of, place, words), words)
    divisor = 1.0
    if tempered:
        divisor = divisor_of(tl.load(rules + place * 4))
    key = tl.max(logit_key(x), 1)
    weight = tl.sum(weights_of(x, key_float(key)[:, None], divisor), 1)
    tl.store(keys + place * groups + group, key, group < groups)
    tl.store(sums + place * groups + group, weight, group < groups)
