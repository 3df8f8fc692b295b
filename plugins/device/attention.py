"""The arithmetic of attention that PagedAttention and AttentionMerge share, one order of operations for both.

A sequence's keys are cut into parts of fixed length. A part's result stands by itself (`step`, `finished`), and parts
are joined in order (`shares`), whether in registers or by AttentionMerge from memory: a token's result does not depend
on the way (prompts in `tall` tiles, below, are the exception: they have no parts). Multiplications that feed an
addition are written as `fma`: left to the compiler, they would be fused in one kernel and not in the other.

Maxima and sums are in units of log2 (exp2 is an instruction); a maximum starts at a finite value, so that rows without
a visible key give 0 and never NaN (Milakov & Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135).

Query rows stand on axis 0 of a `tall` tile, [rows, keys] and [rows, head_dim], else on axis 1, [keys, rows] and
[head_dim, rows]: the tensor core takes 64 on its first axis and as little as 8 on its second, and in decoding rows are
few. Both multiply bf16 operands and add in f32, but in other instructions, and sums over keys go over other threads:
results of the two differ in the last bits.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # a maximum over nothing
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def nothing(rows: tl.constexpr, head_dim: tl.constexpr, tall: tl.constexpr):
    """(maximum [rows], Σ exp [rows], Σ exp · value) before the first key."""
    mixed = tl.zeros((rows, head_dim) if tall else (head_dim, rows), tl.float32)
    return tl.full([rows], LOWEST, tl.float32), tl.zeros([rows], tl.float32), mixed


@triton.jit
def products(key, query, tall: tl.constexpr):
    """f32 products of key [keys, head_dim] with a tall query or not, laid out as it."""
    if tall:
        return tl.dot(query, tl.trans(key), input_precision="ieee")
    else:  # noqa: RET505
        return tl.dot(key, query, input_precision="ieee")


@triton.jit
def step(scores, value, visible, top, weight, mixed, scale: tl.constexpr, tall: tl.constexpr):
    """One tile of keys more: (maximum [rows], Σ exp [rows], Σ exp · value), all f32.

    scores of `products`, value [keys, head_dim], visible bool as scores.
    """
    over_keys: tl.constexpr = 1 if tall else 0
    scores = tl.where(visible, scores, float("-inf"))
    new = tl.maximum(top, tl.max(scores, over_keys) * (scale * LOG2_E))
    powers = tl.exp2(tl.fma(scores, scale * LOG2_E, -tl.expand_dims(new, over_keys)))
    fade = tl.exp2(top - new)
    weight = tl.fma(weight, fade, tl.sum(powers, over_keys))
    mixed = mixed * tl.expand_dims(fade, over_keys)
    powers = powers.to(value.dtype)
    if tall:
        mixed = tl.dot(powers, value, mixed, input_precision="ieee")
    else:
        mixed = tl.dot(tl.trans(value), powers, mixed, input_precision="ieee")
    return new, weight, mixed


@triton.jit
def finished(top, weight, mixed, tall: tl.constexpr):
    """(result, lse [rows]) of a part: 0 and −inf for rows that see none of its keys."""
    seen = weight != 0  # NaN too: a part with a broken key must break the row, not drop out of it
    result = mixed * tl.expand_dims(tl.where(seen, 1.0 / weight, 0.0), 1 if tall else 0)
    return result, tl.where(seen, (top + tl.log2(weight)) * LN_2, float("-inf"))


@triton.jit
def shares(lse, top):
    """How one more part joins: (maximum, factor of what is joined already, factor of this part), shaped as lse.

    joined = fma(part, this part's factor, joined · factor of what is joined); the sum of the factors in the same way.
    """
    new = tl.maximum(top, lse * LOG2_E)
    return new, tl.exp2(top - new), tl.exp2(tl.fma(lse, LOG2_E, -new))


@triton.jit
def inverse(total):
    """1 / total, and 0 where nothing was joined."""
    return tl.where(total > 0, 1.0 / total, 0.0)
