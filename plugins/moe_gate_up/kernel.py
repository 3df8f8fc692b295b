"""MoEGateUp's kernel: programs share the tiles of all experts; a tile is n channels of m of an expert's rows. bf16."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import triton
import triton.language as tl

from angelforge.plugins.device.expert_launch import expert_constants, expert_grid
from angelforge.plugins.device.experts import fill_unowned, piece_of_work, pieces_of_work, tile_ends
from angelforge.plugins.device.launch import require_bf16
from angelforge.plugins.device.matmul import gate_up
from angelforge.plugins.kernel import Kernel, Tile
from angelforge.plugins.moe_gate_up.operator import MOE_GATE_UP


@triton.jit(do_not_specialize=["tokens"])
def _moe_gate_up(
    x,
    gate,
    up,
    expert_ids,
    expert_tokens,
    tokens,
    inner,
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
        expert, column, _end, token, entry = piece_of_work(
            ends, work, expert_ids, expert_tokens, tokens, per_token, columns, m, span, reach
        )
        weights = expert * (channels * depth)
        first = column * n
        value = gate_up(x, token, gate + weights, up + weights, first, tokens, channels, depth, m, n, k)
        channel = first + tl.arange(0, n)
        mask = (entry >= 0)[:, None] & (channel < channels)[None, :]
        target = inner + entry.to(tl.int64)[:, None] * channels + channel[None, :]
        tl.store(target, value.to(inner.dtype.element_ty), mask)
    zero = tl.zeros((1, 1), inner.dtype.element_ty)
    fill_unowned(inner, zero, expert_ids, expert_tokens, tokens, experts, per_token, channels, fill)


def _constants(dims: Mapping[str, Any], types: Mapping[str, ir.DataType], tile: Tile) -> dict[str, Any]:
    require_bf16("MoEGateUp", types, "x", "gate", "up")
    return expert_constants(dims, tile, dims["I"], dims["H"])


def _tile(dims: Mapping[str, Any], tokens: int) -> Tile:
    if tokens <= 256:
        return Tile(m=16, n=64, k=32, stages=5, blocks_per_sm=4)
    return Tile(m=64, n=64, k=64, blocks_per_sm=2)


KERNEL = Kernel(
    operator=MOE_GATE_UP,
    function=_moe_gate_up,
    extras=("T",),
    constants=_constants,
    grid=expert_grid,
    tile=_tile,
)
