"""MoEDown's kernel: programs share the tiles of all experts; a tile is n channels of m of an expert's rows. bf16."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import triton
import triton.language as tl

from angelforge.plugins.device.expert_launch import expert_constants, expert_grid
from angelforge.plugins.device.experts import fill_unowned, piece_of_work, pieces_of_work, tile_ends
from angelforge.plugins.device.launch import require_bf16
from angelforge.plugins.device.matmul import matmul
from angelforge.plugins.kernel import Kernel, Tile
from angelforge.plugins.moe_down.operator import MOE_DOWN


@triton.jit(do_not_specialize=["tokens"])
def _moe_down(
    inner,
    down,
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
    ends = tile_ends(expert_tokens, tokens, experts, m, count)
    for work in range(tl.program_id(0), pieces_of_work(ends, columns, span), tl.num_programs(0)):
        expert, column, _end, _token, entry = piece_of_work(
            ends, work, expert_ids, expert_tokens, tokens, per_token, columns, m, span, reach
        )
        weights, row = down + expert * (channels * depth), tl.maximum(entry, 0).to(tl.int64)
        first = column * n
        value = matmul(inner, row, weights, first, tokens, channels, depth, m, n, k)
        channel = first + tl.arange(0, n)
        mask = (entry >= 0)[:, None] & (channel < channels)[None, :]
        target = expert_out + entry.to(tl.int64)[:, None] * channels + channel[None, :]
        tl.store(target, value.to(expert_out.dtype.element_ty), mask)
    zero = tl.zeros((1, 1), expert_out.dtype.element_ty)
    fill_unowned(expert_out, zero, expert_ids, expert_tokens, tokens, experts, per_token, channels, fill)


def _constants(dims: Mapping[str, Any], types: Mapping[str, ir.DataType], tile: Tile) -> dict[str, Any]:
    require_bf16("MoEDown", types, "inner", "down")
    return expert_constants(dims, tile, dims["H"], dims["I"])


def _tile(dims: Mapping[str, Any], tokens: int) -> Tile:
    if tokens <= 256:
        return Tile(m=16, n=64, k=64, stages=4, blocks_per_sm=4)
    return Tile(m=64, n=128, k=64, blocks_per_sm=2)


KERNEL = Kernel(
    operator=MOE_DOWN,
    function=_moe_down,
    extras=("T",),
    constants=_constants,
    grid=expert_grid,
    tile=_tile,
)
