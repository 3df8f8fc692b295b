"""Fp8GateUp's kernel: a program computes 128 channels, one quantisation group, of a tile of tokens."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import triton
import triton.language as tl

from angelforge.plugins.device.fp8 import fp8_gate_up
from angelforge.plugins.device.launch import matmul_constants, require_whole_blocks, tile_grid
from angelforge.plugins.device.tokens import tile_of
from angelforge.plugins.fp8_gate_up.operator import FP8_GATE_UP
from angelforge.plugins.kernel import Kernel, Tile

GROUP = 128


@triton.jit(do_not_specialize=["tokens"])
def _fp8_gate_up(
    x,
    x_scale,
    gate,
    gate_scale,
    up,
    up_scale,
    tokens,
    inner,
    inner_scale,
    channels: tl.constexpr,
    depth: tl.constexpr,
    m: tl.constexpr,
    n: tl.constexpr,
    k: tl.constexpr,
):
    token, rows, first = tile_of(tokens, channels, m, n)
    fp8_gate_up(
        x,
        x_scale,
        rows,
        gate,
        gate_scale,
        up,
        up_scale,
        first,
        tokens,
        inner,
        inner_scale,
        token,
        token < tokens,
        channels,
        depth,
        m,
        k,
    )


def _constants(dims: Mapping[str, Any], types: Mapping[str, ir.DataType], tile: Tile) -> dict[str, Any]:
    require_whole_blocks(tile, (GROUP,))
    return matmul_constants(dims["F"], dims["H"], tile)


def _tile(dims: Mapping[str, Any], tokens: int) -> Tile:
    if tokens <= 16:
        return Tile(m=16, n=GROUP, k=64, stages=5)
    if tokens <= 64:
        return Tile(m=32, n=GROUP, k=64, stages=4)
    return Tile(m=64, n=GROUP, k=64, stages=4) if tokens <= 256 else Tile(m=128, n=GROUP, warps=8)


def _small_tile(dims: Mapping[str, Any], tokens: int) -> Tile:
    # 64 rows of 4 warps spill without Hopper's wgmma.
    return _tile(dims, min(tokens, 64) if tokens <= 256 else tokens)


KERNEL = Kernel(
    operator=FP8_GATE_UP,
    function=_fp8_gate_up,
    extras=("T",),
    constants=_constants,
    grid=lambda dims, gpu, tile: tile_grid(dims["T"], dims["F"], tile),
    tile=_tile,
    small_tile=_small_tile,
)
