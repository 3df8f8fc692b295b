"""Fp8MoEGateUp's kernel: programs share the tiles of all experts; a tile is 128 channels of m of an expert's rows."""

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from angelforge.plugins.device.expert_launch import expert_constants, expert_grid
from angelforge.plugins.device.experts import entry_of, fill_unowned, tile_ends, tile_of_work, tokens_of_tile
from angelforge.plugins.device.fp8 import fp8_gate_up
from angelforge.plugins.device.fp8_wide import fp8_gate_up_wide
from angelforge.plugins.device.numbers import group_scale
from angelforge.plugins.fp8_moe_gate_up.operator import FP8_MOE_GATE_UP
from angelforge.plugins.kernel import Kernel, Tile


@triton.jit(do_not_specialize=["tokens"])
def _fp8_moe_gate_up(
    x,
    x_scale,
    gate,
    gate_scale,
    up,
    up_scale,
    expert_ids,
    expert_tokens,
    tokens,
    inner,
    inner_scale,
    experts: tl.constexpr,
    per_token: tl.constexpr,
    channels: tl.constexpr,
    depth: tl.constexpr,
    m: tl.constexpr,
    n: tl.constexpr,
    k: tl.constexpr,
    at_once: tl.constexpr,
    fill: tl.constexpr,
):
    columns: tl.constexpr = (channels + n - 1) // n
    blocks: tl.constexpr = columns * ((depth + 127) // 128)
    ends = tile_ends(expert_tokens, tokens, experts, m, at_once)
    for work in range(tl.program_id(0), tl.max(ends) * columns, tl.num_programs(0)):
        expert, tile, column = tile_of_work(ends, work, columns)
        token = tokens_of_tile(expert_tokens, expert, tile, tokens, m, at_once)
        entry = entry_of(expert_ids, token, expert, per_token)
        row, first, valid = tl.maximum(token, 0).to(tl.int64), column * n, entry >= 0
        weights, scales = expert.to(tl.int64) * (channels * depth), expert.to(tl.int64) * blocks
        gate_e, gate_s, up_e, up_s = gate + weights, gate_scale + scales, up + weights, up_scale + scales
        if m < 64:
            fp8_gate_up(
                x, x_scale, row, gate_e, gate_s, up_e, up_s, first, tokens, inner, inner_scale, entry, valid,
                channels, depth, m, k,
            )  # fmt: skip
        else:
            fp8_gate_up_wide(
                x, x_scale, row, gate_e, gate_s, up_e, up_s, first, tokens, inner, inner_scale, entry, valid,
                channels, depth, m,
            )  # fmt: skip
    zero, least = tl.zeros((1, 1), tl.float8e4nv), group_scale(tl.zeros((1, 1), tl.float32))
    fill_unowned(inner, zero, expert_ids, expert_tokens, tokens, experts, per_token, channels, fill)
    fill_unowned(inner_scale, least, expert_ids, expert_tokens, tokens, experts, per_token, columns, fill)


def _tile(dims: Mapping[str, Any], tokens: int) -> Tile:
    if tokens <= 256:
        return Tile(m=16, n=128, k=64, stages=5, blocks_per_sm=4)
    return Tile(m=64, n=128, warps=8)


KERNEL = Kernel(
    operator=FP8_MOE_GATE_UP,
    function=_fp8_moe_gate_up,
    extras=("T",),
    constants=lambda dims, types, tile: expert_constants(dims, tile, dims["I"], dims["H"]),
    grid=expert_grid,
    tile=_tile,
)
