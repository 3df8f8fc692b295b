"""Matmuls of e4m3 activations and weights in blocks of 128, for kernels with one weight and with gate and up.

The tensor core sums one block of 128; blocks are summed in f32 in the order of K, whatever the tile: a row's result
does not depend on how many rows there are. `first` is a tile's first output channel, `rows` int64 [m] are rows of x
that exist, `unknown` is any value ≥ 0 that is known at run time only.
"""

import triton
import triton.language as tl

from angelforge.plugins.device.matmul import load_part, product, weight_rows
from angelforge.plugins.device.numbers import group_scale, opaque, quantize, swiglu


@triton.jit
def _continued(block, zero, step, parts: tl.constexpr):
    """What the tensor core adds to: 0 at the first part of a block of 128."""
    return zero if parts == 1 else tl.where(step % parts == 0, 0.0, block)


@triton.jit
def _promoted(total, block, scale, step, parts: tl.constexpr):
    """total + block · scale at the last part of a block."""
    if parts == 1:
        return total + block * scale
    else:  # noqa: RET505
        return tl.where(step % parts == parts - 1, total + block * scale, total)


@triton.jit
def fp8_matmul(
    x,
    x_scale,
    rows,
    w,
    w_scale,
    first,
    unknown,
    channels: tl.constexpr,
    depth: tl.constexpr,
    m: tl.constexpr,
    n: tl.constexpr,
    k: tl.constexpr,
):
    """f32 [m, n]: rows of x [., depth] times weight rows first … first + n − 1 (n and k divide 128)."""
    groups: tl.constexpr = (depth + 128 - 1) // 128
    parts: tl.constexpr = 128 // k
    x_tile = x + rows[:, None] * depth + tl.arange(0, k)[None, :]
    w_tile = weight_rows(w, first, channels, depth, n, k)
    x_scales = x_scale + rows * groups
    w_scales = w_scale + first // 128 * groups
    narrow: tl.constexpr = m < 64
    zero = tl.zeros((n, m) if narrow else (m, n), tl.float32)
    total, block = zero, zero
    for step in range(opaque(groups * parts, unknown)):
        group = step // parts
        x_part, w_part = load_part(x_tile, step * k, depth, k, 128), load_part(w_tile, step * k, depth, k, 128)
        block = product(x_part, w_part, _continued(block, zero, step, parts), m)
        scale = tl.load(x_scales + group) * tl.load(w_scales + group)
        total = _promoted(total, block, tl.expand_dims(scale, 0 if narrow else 1), step, parts)
    return tl.trans(total) if narrow else total


@triton.jit
def fp8_gate_up(
    x,
    x_scale,
    rows,
    gate,
    gate_scale,
    up,
    up_scale,
    first,
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
    """Stores silu(x · gateᵀ) · (x · upᵀ) for 128 channels from `first` on, quantised, to rows `targets` where `valid`.

    f32 between the matmuls and the quantisation. The 128 channels are computed as two halves of 64, one after the
    other: a decode tile then fits in 48 KB of shared memory, a prefill tile in the registers.
    """
    narrow: tl.constexpr = m < 64
    token_axis: tl.constexpr = 1 if narrow else 0
    low, high = _gate_up_halves(x, x_scale, rows, gate, gate_scale, up, up_scale, first, unknown, channels, depth, m, k)
    channel = first + tl.arange(0, 64)
    low = tl.where(tl.expand_dims(channel < channels, token_axis), low, 0.0)
    high = tl.where(tl.expand_dims(channel + 64 < channels, token_axis), high, 0.0)
    amax = tl.maximum(tl.max(tl.abs(low), 1 - token_axis), tl.max(tl.abs(high), 1 - token_axis))
    scale = group_scale(amax)
    groups: tl.constexpr = (channels + 128 - 1) // 128
    tl.store(inner_scale + targets * groups + first // 128, scale, mask=valid)
    divisor = tl.expand_dims(scale, 1 - token_axis)
    low, high = quantize(low, divisor), quantize(high, divisor)
    target = inner + targets[:, None] * channels + channel[None, :]
    mask = valid[:, None] & (channel < channels)[None, :]
    tl.store(target, tl.trans(low) if narrow else low, mask=mask)
    mask = valid[:, None] & (channel + 64 < channels)[None, :]
    tl.store(target + 64, tl.trans(high) if narrow else high, mask=mask)


@triton.jit
def _gate_up_halves(
    x,
    x_scale,
    rows,
    gate,
    gate_scale,
    up,
    up_scale,
    first,
    unknown,
    channels: tl.constexpr,
    depth: tl.constexpr,
    m: tl.constexpr,
    k: tl.constexpr,
):
    """swiglu of channels first … first + 63 and of the next 64, f32 [m, 64] each, for m < 64 rows [64, m].

    One loop goes through both halves, so that loads never pause between them.
    """
    narrow: tl.constexpr = m < 64
    parts: tl.constexpr = 128 // k
    groups: tl.constexpr = (depth + 128 - 1) // 128
    steps: tl.constexpr = groups * parts
    x_tile = x + rows[:, None] * depth + tl.arange(0, k)[None, :]
    gate_scales = gate_scale + first // 128 * groups
    up_scales = up_scale + first // 128 * groups
    zero = tl.zeros((64, m) if narrow else (m, 64), tl.float32)
    gated, upped, gate_block, up_block, low_gated, low_upped = zero, zero, zero, zero, zero, zero
    for turn in range(opaque(2 * steps, unknown)):
        step = turn % steps
        channel = tl.minimum(first + turn // steps * 64 + tl.arange(0, 64), channels - 1).to(tl.int64)
        offsets = channel[:, None] * depth + tl.arange(0, k)[None, :]
        x_part = load_part(x_tile, step * k, depth, k, 128)
        gate_part, up_part = (
            load_part(gate + offsets, step * k, depth, k, 128),
            load_part(up + offsets, step * k, depth, k, 128),
        )
        gate_block = product(x_part, gate_part, _continued(gate_block, zero, step, parts), m)
        up_block = product(x_part, up_part, _continued(up_block, zero, step, parts), m)
        group = step // parts
        scale = tl.expand_dims(tl.load(x_scale + rows * groups + group), 0 if narrow else 1)
        low_gated, low_upped = tl.where(turn == steps, gated, low_gated), tl.where(turn == steps, upped, low_upped)
        gated, upped = tl.where(step == 0, 0.0, gated), tl.where(step == 0, 0.0, upped)
        gated = _promoted(gated, gate_block, scale * tl.load(gate_scales + group), step, parts)
        upped = _promoted(upped, up_block, scale * tl.load(up_scales + group), step, parts)
    return swiglu(low_gated, low_upped), swiglu(gated, upped)
