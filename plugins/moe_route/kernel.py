"""MoERoute's kernel: a warp chooses the experts of a token, a program those of 8 tokens: a byte of expert_tokens."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import triton
import triton.language as tl

from angelforge.plugins.device.expert_launch import check_experts
from angelforge.plugins.device.launch import ceil_div
from angelforge.plugins.device.numbers import opaque
from angelforge.plugins.device.ordering import NO_KEY, float_key, key_float
from angelforge.plugins.kernel import Gpu, Kernel, Tile
from angelforge.plugins.moe_route.operator import MOE_ROUTE, ROW

TOKENS = 8  # of a program: one byte's
LANES = 32

# Tensors are [slab, token, lane]: slabs stand in registers, tokens are a warp each, and nothing but the bits at the end
# crosses warps. A slab is a group of experts or, of large groups, a part. What is not there has the least key.


@triton.jit
def _expert_at(slot, groups: tl.constexpr, size: tl.constexpr, padded_size: tl.constexpr):
    """(expert, whether there is one) at a slot: groups of `size` experts are padded to `padded_size` slots."""
    expert = slot // padded_size * size + slot % padded_size
    return expert, (slot % padded_size < size) & (slot // padded_size < groups)


@triton.jit
def _sigmoid(x):
    return tl.div_rn(1.0, 1.0 + tl.exp(-x))


@triton.jit
def _first_of_largest(key, slot):
    """[1, token, 1]: where each token's largest key stands; of equal ones the lowest slot."""
    best = tl.max(tl.max(key, 0), 1)[None, :, None]
    return tl.min(tl.min(tl.where(key == best, slot, 0x7FFFFFFF), 0), 1)[None, :, None]


@triton.jit
def _by_group(x, groups: tl.constexpr, parts: tl.constexpr):
    """x [slab, token] as [group, part, token]."""
    return tl.reshape(x, (groups, parts, x.shape[1]))


@triton.jit
def _open_slabs(key, slot, groups: tl.constexpr, parts: tl.constexpr, kept: tl.constexpr, pairs: tl.constexpr):
    """bool [slab, token]: belongs to one of the `kept` best groups by the sum of their two best; ties to the lower.

    `groups` is padded to a power of 2; without `pairs` a group has one expert.
    """
    slabs: tl.constexpr = key.shape[0]
    tokens: tl.constexpr = key.shape[1]
    best = tl.max(_by_group(tl.max(key, 2), groups, parts), 1)
    spread = tl.reshape(tl.broadcast_to(best[:, None, :], (groups, parts, tokens)), (slabs, tokens))[:, :, None]
    first = tl.min(_by_group(tl.min(tl.where(key == spread, slot, 0x7FFFFFFF), 2), groups, parts), 1)
    spread = tl.reshape(tl.broadcast_to(first[:, None, :], (groups, parts, tokens)), (slabs, tokens))[:, :, None]
    second = tl.max(_by_group(tl.max(tl.where(slot == spread, NO_KEY, key), 2), groups, parts), 1)
    score = float_key(key_float(best) + key_float(second)) if pairs else best
    score = tl.where(best == NO_KEY, NO_KEY, score)
    group = tl.arange(0, groups)[:, None]
    opened = tl.zeros((groups, tokens), tl.int32)
    for _ in tl.static_range(kept):
        top = tl.max(score, 0)[None, :]
        winner = tl.min(tl.where(score == top, group, groups), 0)[None, :]
        opened = tl.where(group == winner, 1, opened)
        score = tl.where(group == winner, NO_KEY, score)
    return tl.reshape(tl.broadcast_to(opened[:, None, :], (groups, parts, tokens)), (slabs, tokens)) > 0


@triton.jit
def _store_bits(expert_tokens, taken, valid, expert, there, tokens, experts: tl.constexpr, shared: tl.constexpr):
    """This program's byte of every expert's row: `taken` [slab, token, lane] of the `valid` tokens."""
    octet = expert_tokens.to(tl.pointer_type(tl.int8), bitcast=True) + tl.program_id(0)
    stride = ((tokens + 127) // 128 * 16).to(tl.int64)
    bit = tl.where(valid, 1 << tl.arange(0, valid.shape[0]), 0)
    byte = tl.sum(tl.where(taken, bit[None, :, None], 0), 1)
    tl.store(octet + tl.reshape(expert, byte.shape) * stride, byte.to(tl.int8), tl.reshape(there, byte.shape))
    everyone = tl.sum(bit).to(tl.int8)
    for s in tl.static_range(shared):
        tl.store(octet + (experts + s) * stride, everyone)


@triton.jit
def _store_choice(
    row,
    chosen,
    token,
    valid,
    tokens,
    expert_ids,
    expert_weights,
    experts: tl.constexpr,
    top_k: tl.constexpr,
    shared: tl.constexpr,
    factor: tl.constexpr,
):
    """Ids and weights of the experts `chosen` [token, wide], shared ones appended; `row` points to a token's logits."""
    per_token: tl.constexpr = top_k + shared
    column = tl.arange(0, chosen.shape[1])[None, :]
    routed = column < top_k
    picked = tl.where(routed, _sigmoid(tl.load(row[:, None] + tl.minimum(chosen, experts - 1), routed, 0.0)), 0.0)
    # The published code leaves a single expert's weight as it is.
    share = picked if top_k == 1 else tl.div_rn(picked, tl.sum(picked, 1)[:, None] + 1e-20)
    place = token.to(tl.int64)[:, None] * per_token + column
    mask = (token < tokens)[:, None] & (column < per_token)
    index = tl.where(routed, chosen, experts + column - top_k)
    tl.store(expert_ids + place, tl.where(valid[:, None], index, -1), mask)
    tl.store(expert_weights + place, tl.where(valid[:, None], tl.where(routed, share * factor, 1.0), 0.0), mask)


@triton.jit(do_not_specialize=["tokens"])
def _moe_route(
    logits,
    bias,
    num_tokens,
    tokens,
    expert_ids,
    expert_weights,
    expert_tokens,
    experts: tl.constexpr,
    groups: tl.constexpr,
    topk_group: tl.constexpr,
    top_k: tl.constexpr,
    shared: tl.constexpr,
    factor: tl.constexpr,
    m: tl.constexpr,
    padded_groups: tl.constexpr,
    padded_size: tl.constexpr,
    lanes: tl.constexpr,
):
    size: tl.constexpr = experts // groups
    slabs: tl.constexpr = padded_groups * padded_size // lanes
    token = tl.program_id(0) * m + tl.arange(0, m)
    slot = tl.arange(0, slabs)[:, None, None] * lanes + tl.arange(0, lanes)[None, None, :]
    expert, there = _expert_at(slot, groups, size, padded_size)
    if tl.program_id(0) * m >= tokens:  # pads a row of expert_tokens
        nothing = tl.zeros((slabs, m, lanes), tl.int1)
        _store_bits(expert_tokens, nothing, token < 0, expert, there, tokens, experts, shared)
        return
    valid = token < tl.minimum(tl.load(num_tokens), tokens)
    row = logits + tl.minimum(token, tokens - 1).to(tl.int64) * experts

    # Line r of the loads is slab r // m of token r % m, and each thread loads single values: this makes a token a warp
    # in every version of Triton.
    line = tl.arange(0, slabs * m)[:, None]
    source, known = _expert_at(line // m * lanes + tl.arange(0, lanes)[None, :], groups, size, padded_size)
    source += opaque(0, tokens)
    own = tl.minimum(tl.program_id(0) * m + line % m, tokens - 1).to(tl.int64) * experts
    biased = _sigmoid(tl.load(logits + own + source, known, 0.0)) + tl.load(bias + source, known, 0.0)
    key = tl.where(there, float_key(tl.reshape(biased, (slabs, m, lanes))), NO_KEY)
    opened = _open_slabs(key, slot, padded_groups, padded_size // lanes, topk_group, size > 1)
    key = tl.where(opened[:, :, None] | ~there, key, float_key(tl.full((1, 1, 1), float("-inf"), tl.float32)))

    wide: tl.constexpr = max(lanes, triton.next_power_of_2(top_k + shared))
    chosen = tl.zeros((m, wide), tl.int32)
    for j in tl.static_range(top_k):
        first = _first_of_largest(key, slot)
        key = tl.where(slot == first, NO_KEY, key)
        chosen = tl.where(tl.arange(0, wide)[None, :] == j, tl.reshape(first, (m, 1)), chosen)
    chosen = chosen // padded_size * size + chosen % padded_size
    _store_choice(row, chosen, token, valid, tokens, expert_ids, expert_weights, experts, top_k, shared, factor)
    _store_bits(expert_tokens, there & (key == NO_KEY), valid, expert, there, tokens, experts, shared)


def _constants(dims: Mapping[str, Any], types: Mapping[str, ir.DataType], tile: Tile) -> dict[str, Any]:
    experts, groups = dims["E"], dims["n_group"]
    check_experts(experts + dims["num_shared_experts"], dims["top_k"] + dims["num_shared_experts"])
    padded_groups, padded_size = (1 << (size - 1).bit_length() for size in (groups, experts // groups))
    return {
        "experts": experts,
        "groups": groups,
        "topk_group": dims["topk_group"],
        "top_k": dims["top_k"],
        "shared": dims["num_shared_experts"],
        "factor": dims["routed_scaling_factor"],
        "m": TOKENS,
        "padded_groups": padded_groups,
        "padded_size": padded_size,
        "lanes": min(LANES, padded_size),
    }


def _grid(dims: Mapping[str, Any], gpu: Gpu, tile: Tile) -> tuple[Any, int, int]:
    return ceil_div(dims["T"], ROW) * (ROW // TOKENS), 1, 1


KERNEL = Kernel(
    operator=MOE_ROUTE,
    function=_moe_route,
    extras=("T",),
    constants=_constants,
    grid=_grid,
    tile=lambda dims, tokens: Tile(m=TOKENS, n=LANES, warps=TOKENS, stages=1),
)
