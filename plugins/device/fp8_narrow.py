"""Gate and up in one e4m3 product, for few rows: as little as possible happens between two loads.

Sums are those of `device.fp8`: blocks of 128 by the tensor core, added in f32 in the order of K. A block comes in parts
of k columns, so that 48 KB of shared memory hold enough loads under way; what happens once a block stands in a branch,
so that the tensor core works on while the next part is awaited. One token occupies few SMs: each must then read
some 60 GB/s, a part of 9 KB every 250 cycles.
"""

import triton
import triton.language as tl

from angelforge.plugins.device.numbers import group_scale, opaque, quantize, swiglu


@triton.jit
def _part(pointers, start, depth: tl.constexpr, k: tl.constexpr):
    """A tile [., k] at column `start`; columns from `depth` on are 0."""
    if depth % 128 == 0:
        return tl.load(pointers + start)
    else:  # noqa: RET505  # Triton compiles what follows an if, too
        return tl.load(pointers + start, (start + tl.arange(0, k) < depth)[None, :], 0.0)


@triton.jit
def fp8_gate_up_narrow(
    x,
    x_scale,
    rows,
    gate,
    gate_scale,
    up,
    up_scale,
    column,
    unknown,
    inner,
    inner_scale,
    targets,
    valid,
    channels: tl.constexpr,
    depth: tl.constexpr,
    m: tl.constexpr,
    k: tl.constexpr,
):
    """Stores silu(x · gateᵀ) · (x · upᵀ), quantised, for `column` of 128 channels to rows `targets` where `valid`.

    Twice 64 channels, gate and up side by side in one product: one load gathers both tensors through the distance
    between them in memory. `rows` and `targets` are int64 [m].
    """
    parts: tl.constexpr = 128 // k
    groups: tl.constexpr = (depth + 127) // 128
    steps: tl.constexpr = groups * parts
    x_tile = x + rows[:, None] * depth + tl.arange(0, k)[None, :]
    row, half = tl.arange(0, 128), tl.arange(0, 2)
    apart = tl.multiple_of(up.to(tl.int64) - gate.to(tl.int64), 16)  # bytes, an element each
    block = tl.zeros((128, m), tl.float32)
    total = tl.zeros((2, 64, m), tl.float32)  # gate, up
    low = total
    for turn in range(opaque(2 * steps, unknown)):
        step = turn % steps
        channel = tl.minimum(column * 128 + turn // steps * 64 + row % 64, channels - 1).to(tl.int64)
        w_tile = gate + (channel * depth + row // 64 * apart)[:, None] + tl.arange(0, k)[None, :]
        x_part = _part(x_tile, step * k, depth, k)
        block = tl.dot(_part(w_tile, step * k, depth, k), tl.trans(x_part), block)
        if step % parts == parts - 1:
            group = step // parts
            scale = column * groups + group
            scale = tl.where(half == 0, tl.load(gate_scale + scale), tl.load(up_scale + scale))
            scale = tl.load(x_scale + rows * groups + group)[None, None, :] * scale[:, None, None]
            total += tl.reshape(block, (2, 64, m)) * scale
            block = tl.zeros((128, m), tl.float32)
            if turn == steps - 1:
                low = total
                total = tl.zeros((2, 64, m), tl.float32)
    _store_halves(low, total, column * 128, inner, inner_scale, targets, valid, channels)


@triton.jit
def _store_halves(low, high, first, inner, inner_scale, targets, valid, channels: tl.constexpr):
    """silu(gate) · up of two [gate or up, 64, m], quantised as one block."""
    channel = first + tl.arange(0, 64)
    gated, upped = tl.split(tl.permute(low, (1, 2, 0)))
    low = tl.where((channel < channels)[:, None], swiglu(gated, upped), 0.0)
    gated, upped = tl.split(tl.permute(high, (1, 2, 0)))
    high = tl.where((channel + 64 < channels)[:, None], swiglu(gated, upped), 0.0)
    scale = group_scale(tl.maximum(tl.max(tl.abs(low), 0), tl.max(tl.abs(high), 0)))
    tl.store(inner_scale + targets * ((channels + 127) // 128) + first // 128, scale, valid)
    target = inner + targets[:, None] * channels + channel[None, :]
    mask = valid[:, None] & (channel < channels)[None, :]
    tl.store(target, tl.trans(quantize(low, scale[None, :])), mask)
    mask = valid[:, None] & (channel + 64 < channels)[None, :]
    tl.store(target + 64, tl.trans(quantize(high, scale[None, :])), mask)
