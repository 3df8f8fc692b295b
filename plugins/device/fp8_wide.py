"""Gate and up in one e4m3 product, for many rows: both halves of the weight tile feed one wide tensor-core instruction.

Sums are those of `device.fp8`: blocks of 128 by the tensor core, added in f32 in the order of K.
"""

import triton
import triton.language as tl

from angelforge.plugins.device.numbers import group_scale, opaque, quantize, swiglu


@triton.jit
def fp8_gate_up_wide(
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
):
    """Stores silu(x · gateᵀ) · (x · upᵀ) for 128 channels from `first` on, quantised, to rows `targets` where `valid`.

    Arguments are those of `device.fp8.fp8_gate_up`, for m ≥ 64 rows. Columns 0–127 of the product are gate's channels,
    128–255 up's: one load gathers both tensors through the distance between them in memory.
    """
    groups: tl.constexpr = (depth + 127) // 128
    column = tl.arange(0, 128)
    x_tile = x + rows[:, None] * depth + column[None, :]
    half = tl.arange(0, 256) // 128
    channel = tl.minimum(first + tl.arange(0, 256) % 128, channels - 1).to(tl.int64)
    apart = tl.multiple_of(up.to(tl.int64) - gate.to(tl.int64), 16)  # bytes, an element each
    w_tile = gate + (channel * depth + half * apart)[:, None] + column[None, :]
    scales = first // 128 * groups
    total = tl.zeros((m, 256), tl.float32)
    for group in range(opaque(groups, unknown)):
        start = group * 128
        if depth % 128 == 0:
            x_part, w_part = tl.load(x_tile + start), tl.load(w_tile + start)
        else:
            inside = (start + column < depth)[None, :]
            x_part, w_part = tl.load(x_tile + start, inside, 0.0), tl.load(w_tile + start, inside, 0.0)
        w_scale = tl.where(half == 0, tl.load(gate_scale + scales + group), tl.load(up_scale + scales + group))
        scale = tl.load(x_scale + rows * groups + group)[:, None] * w_scale[None, :]
        total += tl.dot(x_part, tl.trans(w_part)) * scale
    gated, upped = tl.split(tl.permute(tl.reshape(total, (m, 2, 128)), (0, 2, 1)))
    inside = (first + column < channels)[None, :]
    value = tl.where(inside, swiglu(gated, upped), 0.0)
    scale = group_scale(tl.max(tl.abs(value), 1))
    tl.store(inner_scale + targets * ((channels + 127) // 128) + first // 128, scale, valid)
    target = inner + targets[:, None] * channels + (first + column)[None, :]
    tl.store(target, quantize(value, scale[:, None]), valid[:, None] & inside)
