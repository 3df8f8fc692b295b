"""Fp8Linear's kernel: a program computes a tile of tokens × output channels over the whole of K."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import triton
import triton.language as tl

from angelforge.plugins.device.fp8 import fp8_matmul
from angelforge.plugins.device.launch import matmul_constants, require_whole_blocks, tile_grid
from angelforge.plugins.device.tokens import tile_of
from angelforge.plugins.fp8_linear.operator import FP8_LINEAR
from angelforge.plugins.kernel import Kernel, Tile


@triton.jit(do_not_specialize=["tokens"])
def _fp8_linear(
    x,
    x_scale,
    weight,
    weight_scale,
    tokens,
    y,
    channels: tl.constexpr,
    depth: tl.constexpr,
    m: tl.constexpr,
    n: tl.constexpr,
    k: tl.constexpr,
):
    token, rows, first = tile_of(tokens, channels, m, n)
    total = fp8_matmul(x, x_scale, rows, weight, weight_scale, first, tokens, channels, depth, m, n, k)  # [m, n]
    channel = first + tl.arange(0, n)
    mask = (token < tokens)[:, None] & (channel < channels)[None, :]
    tl.store(y + token[:, None] * channels + channel[None, :], total.to(y.dtype.element_ty), mask=mask)


def _constants(dims: Mapping[str, Any], types: Mapping[str, ir.DataType], tile: Tile) -> dict[str, Any]:
    require_whole_blocks(tile)
    return matmul_constants(dims["N"], dims["K"], tile)


def _tile(dims: Mapping[str, Any], tokens: int) -> Tile:
    if tokens <= 16:
        return Tile(m=16, n=64, stages=4)
    if tokens <= 64:
        return Tile(m=32, n=64, stages=4)
    return Tile(m=64, n=128, k=64, stages=4) if tokens <= 256 else Tile(m=128, n=128, warps=8)


KERNEL = Kernel(
    operator=FP8_LINEAR,
    function=_fp8_linear,
    extras=("T",),
    constants=_constants,
    grid=lambda dims, gpu, tile: tile_grid(dims["T"], dims["N"], tile),
    tile=_tile,
)
