"""MoELogits' kernel: f32 multiply-adds, no tensor core; one order of summation for any number of tokens.

The depth is cut into 32 slices: slice s has the columns s, s + 32, s + 64, …, which one thread sums in that order, so
that neighbouring threads read neighbouring columns. Sums of slices are added eight by eight in their order.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import triton
import triton.language as tl

from angelforge.plugins.device.launch import ceil_div
from angelforge.plugins.kernel import Gpu, Kernel, Tile
from angelforge.plugins.moe_logits.operator import MOE_LOGITS

SLICES = 32
LEAST_STEPS = 16  # columns of a slice in one tl.dot; Triton 3.6 takes no fewer


@triton.jit
def _sum_of_slices(x, outputs: tl.constexpr):
    """x [outputs, 32] summed over its last axis: eights from the first to the last, then those."""
    even, odd = tl.split(tl.reshape(x, (outputs, 4, 4, 2)))
    x04, x26 = tl.split(tl.reshape(even, (outputs, 4, 2, 2)))
    x15, x37 = tl.split(tl.reshape(odd, (outputs, 4, 2, 2)))
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    eights = ((((((x0 + x1) + x2) + x3) + x4) + x5) + x6) + x7
    even, odd = tl.split(tl.reshape(eights, (outputs, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return ((x0 + x1) + x2) + x3


@triton.jit
def _logits(
    hidden,
    weight,
    tokens,
    logits,
    experts: tl.constexpr,
    depth: tl.constexpr,
    m: tl.constexpr,
    n: tl.constexpr,
    k: tl.constexpr,
):
    """A tile of m tokens and n experts; k columns of each slice at a time."""
    columns: tl.constexpr = (experts + n - 1) // n
    row = (tl.program_id(0) // columns).to(tl.int64) * m + tl.arange(0, m)
    expert = tl.program_id(0) % columns * n + tl.arange(0, n)
    token, source = tl.minimum(row, tokens - 1), tl.minimum(expert, experts - 1)
    column = tl.arange(0, 32)[:, None] + tl.arange(0, k)[None, :] * 32
    x_tile = hidden + token[None, :, None] * depth + column[:, None, :]  # [slice, token, column]
    w_tile = weight + source[None, :, None] * depth + column[:, None, :]
    slices = tl.zeros((32, m, n), tl.float32)
    for start in range(0, depth, 32 * k):
        if depth % (32 * k) == 0:
            x, w = tl.load(x_tile + start), tl.load(w_tile + start)
        else:
            inside = (start + column < depth)[:, None, :]
            x, w = tl.load(x_tile + start, inside, 0.0), tl.load(w_tile + start, inside, 0.0)
        slices = tl.dot(x.to(tl.float32), tl.permute(w, (0, 2, 1)), slices, input_precision="ieee")
    total = _sum_of_slices(tl.reshape(tl.permute(slices, (1, 2, 0)), (m * n, 32)), m * n)
    result = tl.reshape(total, (m, n))
    mask = (row < tokens)[:, None] & (expert < experts)[None, :]
    tl.store(logits + row[:, None] * experts + expert[None, :], result, mask)


@triton.jit(do_not_specialize=["tokens"])
def _moe_logits(
    hidden,
    weight,
    tokens,
    logits,
    experts: tl.constexpr,
    depth: tl.constexpr,
    m: tl.constexpr,
    n: tl.constexpr,
    k: tl.constexpr,
    row_k: tl.constexpr,
):
    if row_k == 0:
        _logits(hidden, weight, tokens, logits, experts, depth, m, n, k)
    elif tokens == 1:
        _logits(hidden, weight, tokens, logits, experts, depth, 1, n, row_k)
    else:
        _logits(hidden, weight, tokens, logits, experts, depth, m, n, k)


def _constants(dims: Mapping[str, Any], types: Mapping[str, ir.DataType], tile: Tile) -> dict[str, Any]:
    per_slice = max(LEAST_STEPS, 1 << (ceil_div(dims["H"], SLICES) - 1).bit_length())
    return {
        "experts": dims["E"],
        "depth": dims["H"],
        "m": tile.m,
        "n": tile.n,
        "k": tile.k,
        # A single token's columns at once, as far as 48 KB of shared memory reach.
        "row_k": min(per_slice, 128) if tile.n <= 2 else 0,
    }


def _grid(dims: Mapping[str, Any], gpu: Gpu, tile: Tile) -> tuple[Any, int, int]:
    return ceil_div(dims["T"], tile.m) * ceil_div(dims["E"], tile.n), 1, 1


def _tile(dims: Mapping[str, Any], tokens: int) -> Tile:
    if tokens <= 8:
        return Tile(m=8, n=2, k=LEAST_STEPS, warps=2, stages=1)
    if tokens <= 256:
        return Tile(m=16, n=8, k=LEAST_STEPS, stages=1)
    return Tile(m=32, n=32, k=LEAST_STEPS, warps=8, stages=1)  # 128 KB of shared memory


def _small_tile(dims: Mapping[str, Any], tokens: int) -> Tile:
    tile = _tile(dims, tokens)
    return replace(tile, n=min(tile.n, 16))  # 96 KB


KERNEL = Kernel(
    operator=MOE_LOGITS,
    function=_moe_logits,
    extras=("T",),
    constants=_constants,
    grid=_grid,
    tile=_tile,
    small_tile=_small_tile,
)
