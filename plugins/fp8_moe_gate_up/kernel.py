"""Fp8MoEGateUp's kernel: programs share the tiles of all experts; a tile is 128 channels of m of an expert's rows."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import triton
import triton.language as tl

from angelforge.plugins.device.expert_launch import expert_constants, expert_grid, require_fp8_tile
from angelforge.plugins.device.experts import fill_unowned, piece_of_work, pieces_of_work, tile_ends
from angelforge.plugins.device.fp8_narrow import fp8_gate_up_narrow
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
    span: tl.constexpr,
    count: tl.constexpr,
    reach: tl.constexpr,
    fill: tl.constexpr,
):
    columns: tl.constexpr = (channels + n - 1) // n
    blocks: tl.constexpr = columns * ((depth + 127) // 128)
    ends = tile_ends(expert_tokens, tokens, experts, m, count)
    for work in range(tl.program_id(0), pieces_of_work(ends, columns, span), tl.num_programs(0)):
        expert, begin, end, token, entry = piece_of_work(
            ends, work, expert_ids, expert_tokens, tokens, per_token, columns, m, span, reach
        )
        weights, scales = expert * (channels * depth), expert * blocks
        target, valid = entry.to(tl.int64), entry >= 0
        gate_e, gate_s, up_e, up_s = gate + weights, gate_scale + scales, up + weights, up_scale + scales
        if m < 64:
            fp8_gate_up_narrow(
                x, x_scale, token, gate_e, gate_s, up_e, up_s, begin, tokens, inner, inner_scale, target, valid,
                channels, depth, m, k,
            )  # fmt: skip
        else:
            fp8_gate_up_wide(
                x, x_scale, token, gate_e, gate_s, up_e, up_s, begin, end, tokens, inner, inner_scale, target, valid,
                channels, depth, m,
            )  # fmt: skip
    zero, least = tl.zeros((1, 1), tl.float8e4nv), group_scale(tl.zeros((1, 1), tl.float32))
    fill_unowned(inner, zero, expert_ids, expert_tokens, tokens, experts, per_token, channels, fill)
    fill_unowned(inner_scale, least, expert_ids, expert_tokens, tokens, experts, per_token, columns, fill)


def _constants(dims: Mapping[str, Any], types: Mapping[str, ir.DataType], tile: Tile) -> dict[str, Any]:
    require_fp8_tile(tile, narrow=(128,), wide=128)
    return expert_constants(dims, tile, dims["I"], dims["H"], span=4)


def _tile(dims: Mapping[str, Any], tokens: int) -> Tile:
    if tokens <= 256:
        return Tile(m=16, n=128, k=64, stages=5, blocks_per_sm=3)  # Triton 3.6 takes 162 registers
    return Tile(m=64, n=128, warps=8)


KERNEL = Kernel(
    operator=FP8_MOE_GATE_UP,
    function=_fp8_moe_gate_up,
    extras=("T",),
    constants=_constants,
    grid=expert_grid,
    tile=_tile,
)
