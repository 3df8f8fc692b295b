"""Fp8MoEDown's kernel: programs share the tiles of all experts; a tile is n channels of m of an expert's rows."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import triton
import triton.language as tl

from angelforge.plugins.device.expert_launch import expert_constants, expert_grid, require_fp8_tile
from angelforge.plugins.device.experts import fill_unowned, piece_of_work, pieces_of_work, tile_ends
from angelforge.plugins.device.fp8 import fp8_matmul
from angelforge.plugins.device.fp8_wide import fp8_matmul_wide
from angelforge.plugins.fp8_moe_down.operator import FP8_MOE_DOWN
from angelforge.plugins.kernel import Kernel, Tile


@triton.jit(do_not_specialize=["tokens"])
def _fp8_moe_down(
    inner,
    inner_scale,
    down,
    down_scale,
    expert_ids,
    expert_tokens,
    tokens,
    expert_out,
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
    blocks: tl.constexpr = (channels + 127) // 128 * ((depth + 127) // 128)
    ends = tile_ends(expert_tokens, tokens, experts, m, count)
    for work in range(tl.program_id(0), pieces_of_work(ends, columns, span), tl.num_programs(0)):
        expert, begin, end, _token, entry = piece_of_work(
            ends, work, expert_ids, expert_tokens, tokens, per_token, columns, m, span, reach
        )
        weights, scales = down + expert * (channels * depth), down_scale + expert * blocks
        row, valid = tl.maximum(entry, 0).to(tl.int64), entry >= 0
        if m < 64:
            first = begin * n
            value = fp8_matmul(inner, inner_scale, row, weights, scales, first, tokens, channels, depth, m, n, k)
            channel = first + tl.arange(0, n)
            mask = valid[:, None] & (channel < channels)[None, :]
            target = expert_out + entry.to(tl.int64)[:, None] * channels + channel[None, :]
            tl.store(target, value.to(expert_out.dtype.element_ty), mask)
        else:
            fp8_matmul_wide(
                inner, inner_scale, row, weights, scales, begin, end, tokens, expert_out, entry.to(tl.int64), valid,
                channels, depth, m,
            )  # fmt: skip
    zero = tl.zeros((1, 1), expert_out.dtype.element_ty)
    fill_unowned(expert_out, zero, expert_ids, expert_tokens, tokens, experts, per_token, channels, fill)


def _constants(dims: Mapping[str, Any], types: Mapping[str, ir.DataType], tile: Tile) -> dict[str, Any]:
    require_fp8_tile(tile, narrow=(64, 128), wide=256)
    return expert_constants(dims, tile, dims["H"], dims["I"], span=8)


def _tile(dims: Mapping[str, Any], tokens: int) -> Tile:
    if tokens <= 256:
        return Tile(m=16, n=128, k=64, stages=4, blocks_per_sm=4)
    return Tile(m=64, n=256, warps=8)


KERNEL = Kernel(
    operator=FP8_MOE_DOWN,
    function=_fp8_moe_down,
    extras=("T",),
    constants=_constants,
    grid=expert_grid,
    tile=_tile,
)
