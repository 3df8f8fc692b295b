"""Linear's kernel: a program computes a tile of tokens × output channels over the whole of K. bf16 only."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import triton
import triton.language as tl

from angelforge.plugins.device.launch import matmul_constants, require_bf16, tile_grid
from angelforge.plugins.device.matmul import matmul
from angelforge.plugins.device.tokens import tile_of
from angelforge.plugins.kernel import Kernel, Tile
from angelforge.plugins.linear.operator import LINEAR


@triton.jit(do_not_specialize=["tokens"])
def _linear(
    x,
    weight,
    tokens,
    y,
    channels: tl.constexpr,
    depth: tl.constexpr,
    m: tl.constexpr,
    n: tl.constexpr,
    k: tl.constexpr,
):
    token, rows, first = tile_of(tokens, channels, m, n)
    total = matmul(x, rows, weight, first, tokens, channels, depth, m, n, k)  # [m, n]
    channel = first + tl.arange(0, n)
    mask = (token < tokens)[:, None] & (channel < channels)[None, :]
    tl.store(y + token[:, None] * channels + channel[None, :], total.to(y.dtype.element_ty), mask=mask)


def _constants(dims: Mapping[str, Any], types: Mapping[str, ir.DataType], tile: Tile) -> dict[str, Any]:
    require_bf16("Linear", types, "x", "weight")
    return matmul_constants(dims["N"], dims["K"], tile)


def _tile(dims: Mapping[str, Any], tokens: int) -> Tile:
    if tokens <= 16:
        return Tile(m=16, n=64, k=64, stages=4)
    if tokens <= 64:
        return Tile(m=32, n=64, k=64, stages=4)
    return Tile(m=64, n=128, k=32, stages=4) if tokens <= 256 else Tile(m=128, n=128, k=64, warps=8, stages=4)


KERNEL = Kernel(
    operator=LINEAR,
    function=_linear,
    extras=("T",),
    constants=_constants,
    grid=lambda dims, gpu, tile: tile_grid(dims["T"], dims["N"], tile),
    tile=_tile,
)
