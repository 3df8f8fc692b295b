"""GateUp's kernel: a program computes a tile of tokens × channels of both products. bf16 only."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import triton
import triton.language as tl

from angelforge.plugins.device.launch import matmul_constants, require_bf16, tile_grid
from angelforge.plugins.device.matmul import gate_up
from angelforge.plugins.device.tokens import tile_of
from angelforge.plugins.gate_up.operator import GATE_UP
from angelforge.plugins.kernel import Kernel, Tile


@triton.jit(do_not_specialize=["tokens"])
def _gate_up(
    x,
    gate,
    up,
    tokens,
    inner,
    channels: tl.constexpr,
    depth: tl.constexpr,
    m: tl.constexpr,
    n: tl.constexpr,
    k: tl.constexpr,
):
    token, rows, first = tile_of(tokens, channels, m, n)
    value = gate_up(x, rows, gate, up, first, tokens, channels, depth, m, n, k)  # [m, n]
    channel = first + tl.arange(0, n)
    mask = (token < tokens)[:, None] & (channel < channels)[None, :]
    tl.store(inner + token[:, None] * channels + channel[None, :], value.to(inner.dtype.element_ty), mask=mask)


def _constants(dims: Mapping[str, Any], types: Mapping[str, ir.DataType], tile: Tile) -> dict[str, Any]:
    require_bf16("GateUp", types, "x", "gate", "up")
    return matmul_constants(dims["F"], dims["H"], tile)


def _tile(dims: Mapping[str, Any], tokens: int) -> Tile:
    if tokens <= 16:
        return Tile(m=16, n=64, k=32, stages=5)
    if tokens <= 64:
        return Tile(m=32, n=64, k=32, stages=4)
    return Tile(m=64, n=64, k=32, stages=4) if tokens <= 256 else Tile(m=128, n=64, k=64, warps=8)


KERNEL = Kernel(
    operator=GATE_UP,
    function=_gate_up,
    extras=("T",),
    constants=_constants,
    grid=lambda dims, gpu, tile: tile_grid(dims["T"], dims["F"], tile),
    tile=_tile,
)
