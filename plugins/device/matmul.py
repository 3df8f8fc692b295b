"""Matmuls of bf16 with f32 sums, for kernels with one weight and with gate and up.

Sums run over K in one order, whatever the tile: a row's result does not depend on how many rows there are. `first` is
a tile's first output channel, `rows` int64 [m] are rows of x that exist, `unknown` is any value ≥ 0 that is known at
run time only.
"""

import triton
import triton.language as tl

from angelforge.plugins.device.numbers import opaque, swiglu


@triton.jit
def product(x, w, before, m: tl.constexpr):
    """before + x [m, k] · w [n, k]ᵀ; fewer than 64 rows go to the tensor core's narrow side: then sums are [n, m]."""
    if m < 64:
        return tl.dot(w, tl.trans(x), before)
    else:  # noqa: RET505  # Triton compiles what follows an if, too
        return tl.dot(x, tl.trans(w), before)


@triton.jit
def load_part(pointers, start, depth: tl.constexpr, k: tl.constexpr, block: tl.constexpr):
    """A tile [., k] at column `start`; columns from `depth` on are 0. Tiles go on to a multiple of `block`."""
    if depth % block == 0:
        return tl.load(pointers + start)
    else:  # noqa: RET505
        return tl.load(pointers + start, mask=(start + tl.arange(0, k) < depth)[None, :], other=0.0)


@triton.jit
def weight_rows(w, first, channels: tl.constexpr, depth: tl.constexpr, n: tl.constexpr, k: tl.constexpr):
    """Pointers [n, k] to weight rows `first`…; beyond the last one, the last."""
    channel = first + tl.arange(0, n)
    if channels % n != 0:
        channel = tl.minimum(channel, channels - 1)
    return w + channel.to(tl.int64)[:, None] * depth + tl.arange(0, k)[None, :]


@triton.jit
def matmul(
    x,
    rows,
    w,
    first,
    unknown,
    channels: tl.constexpr,
    depth: tl.constexpr,
    m: tl.constexpr,
    n: tl.constexpr,
    k: tl.constexpr,
):
    """f32 [m, n]: rows of x [., depth] times weight rows first … first + n − 1."""
    x_tile = x + rows[:, None] * depth + tl.arange(0, k)[None, :]
    w_tile = weight_rows(w, first, channels, depth, n, k)
    total = tl.zeros((n, m) if m < 64 else (m, n), tl.float32)
    for start in range(0, opaque(depth, unknown), k):
        total = product(load_part(x_tile, start, depth, k, k), load_part(w_tile, start, depth, k, k), total, m)
    return tl.trans(total) if m < 64 else total


@triton.jit
def gate_up(
    x,
    rows,
    gate,
    up,
    first,
    unknown,
    channels: tl.constexpr,
    depth: tl.constexpr,
    m: tl.constexpr,
    n: tl.constexpr,
    k: tl.constexpr,
):
    """f32 [m, n]: silu(x · gateᵀ) · (x · upᵀ) for channels first … first + n − 1."""
    x_tile = x + rows[:, None] * depth + tl.arange(0, k)[None, :]
    gate_tile = weight_rows(gate, first, channels, depth, n, k)
    up_tile = weight_rows(up, first, channels, depth, n, k)
    gated = tl.zeros((n, m) if m < 64 else (m, n), tl.float32)
    upped = tl.zeros((n, m) if m < 64 else (m, n), tl.float32)
    for start in range(0, opaque(depth, unknown), k):
        x_part = load_part(x_tile, start, depth, k, k)
        gated = product(x_part, load_part(gate_tile, start, depth, k, k), gated, m)
        upped = product(x_part, load_part(up_tile, start, depth, k, k), upped, m)
    inner = swiglu(gated, upped)
    return tl.trans(inner) if m < 64 else inner
