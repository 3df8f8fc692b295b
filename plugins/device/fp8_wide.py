"""e4m3 products for many rows: 256 weight rows at a time, so that both warp groups run wide tensor-core instructions.

Sums are those of `device.fp8`: blocks of 128 by the tensor core, added in f32 in the order of K. A product [m, 256] is
kept as [m, 2, 128], two quantisation blocks of channels: so a thread multiplies by one scale for each of its rows.
"""

import triton
import triton.language as tl

from angelforge.plugins.device.numbers import group_scale, opaque, quantize, swiglu


@triton.jit
def _columns(pointers, start, depth: tl.constexpr):
    """A tile [., 128] at column `start`; columns from `depth` on are 0."""
    if depth % 128 == 0:
        return tl.load(pointers + start)
    else:  # noqa: RET505  # Triton compiles what follows an if, too
        return tl.load(pointers + start, (start + tl.arange(0, 128) < depth)[None, :], 0.0)


@triton.jit
def _product(x, w, x_scale, low_scale, high_scale):
    """f32 [m, 2, 128]: x [m, 128] · w [256, 128]ᵀ with x_scale [m] and a scale for each half of w."""
    half = tl.arange(0, 2)[None, :, None]
    scale = x_scale[:, None, None] * tl.where(half == 0, low_scale, high_scale)
    return tl.reshape(tl.dot(x, tl.trans(w)), (x.shape[0], 2, 128)) * scale


@triton.jit
def _store_gate_up(total, first, inner, inner_scale, targets, valid, channels: tl.constexpr):
    """silu(gate) · up of total [m, gate or up, 128], quantised, to rows `targets` where `valid`."""
    gated, upped = tl.split(tl.permute(total, (0, 2, 1)))
    channel = first + tl.arange(0, 128)
    inside = (channel < channels)[None, :]
    value = tl.where(inside, swiglu(gated, upped), 0.0)
    scale = group_scale(tl.max(tl.abs(value), 1))
    tl.store(inner_scale + targets * ((channels + 127) // 128) + first // 128, scale, valid)
    target = inner + targets[:, None] * channels + channel[None, :]
    tl.store(target, quantize(value, scale[:, None]), valid[:, None] & inside)


@triton.jit
def fp8_gate_up_wide(
    x,
    x_scale,
    rows,
    gate,
    gate_scale,
    up,
    up_scale,
    begin,
    end,
    unknown,
    inner,
    inner_scale,
    targets,
    valid,
    channels: tl.constexpr,
    depth: tl.constexpr,
    m: tl.constexpr,
):
    """Stores silu(x · gateᵀ) · (x · upᵀ), quantised, for columns of 128 channels `begin` … `end` − 1.

    Results go to rows `targets` where `valid`. A product's first block is gate's, the second up's: one load gathers
    both tensors through the distance between them in memory. One loop goes through all columns.
    """
    groups: tl.constexpr = (depth + 127) // 128
    x_tile = x + rows[:, None] * depth + tl.arange(0, 128)[None, :]
    apart = tl.multiple_of(up.to(tl.int64) - gate.to(tl.int64), 16)  # bytes, an element each
    tensor = tl.arange(0, 256) // 128 * apart
    total = tl.zeros((m, 2, 128), tl.float32)
    for step in range(opaque((end - begin) * groups, unknown)):
        group = step % groups
        column = begin + step // groups
        channel = tl.minimum(column * 128 + tl.arange(0, 256) % 128, channels - 1).to(tl.int64)
        w_tile = gate + (channel * depth + tensor)[:, None] + tl.arange(0, 128)[None, :]
        x_part, w_part = _columns(x_tile, group * 128, depth), _columns(w_tile, group * 128, depth)
        low_scale, high_scale = (
            tl.load(gate_scale + column * groups + group),
            tl.load(up_scale + column * groups + group),
        )
        total += _product(x_part, w_part, tl.load(x_scale + rows * groups + group), low_scale, high_scale)
        if group == groups - 1:
            _store_gate_up(total, column * 128, inner, inner_scale, targets, valid, channels)
            total = tl.zeros((m, 2, 128), tl.float32)


@triton.jit
def fp8_matmul_wide(
    x,
    x_scale,
    rows,
    w,
    w_scale,
    begin,
    end,
    unknown,
    y,
    targets,
    valid,
    channels: tl.constexpr,
    depth: tl.constexpr,
    m: tl.constexpr,
):
    """Stores x · wᵀ for the columns of 256 channels `begin` … `end` − 1 to rows `targets` where `valid`.

    One loop goes through all of them, so that loads never pause between columns of a shallow product.
    """
    groups: tl.constexpr = (depth + 127) // 128
    blocks: tl.constexpr = (channels + 127) // 128
    x_tile = x + rows[:, None] * depth + tl.arange(0, 128)[None, :]
    total = tl.zeros((m, 2, 128), tl.float32)
    for step in range(opaque((end - begin) * groups, unknown)):
        group = step % groups
        column = begin + step // groups
        channel = tl.minimum(column * 256 + tl.arange(0, 256), channels - 1).to(tl.int64)
        w_tile = w + channel[:, None] * depth + tl.arange(0, 128)[None, :]
        x_part, w_part = _columns(x_tile, group * 128, depth), _columns(w_tile, group * 128, depth)
        low_scale = tl.load(w_scale + column * 2 * groups + group)
        high_scale = tl.load(w_scale + tl.minimum(column * 2 + 1, blocks - 1) * groups + group)
        total += _product(x_part, w_part, tl.load(x_scale + rows * groups + group), low_scale, high_scale)
        if group == groups - 1:
            target = column * 256 + tl.arange(0, 256)
            mask = valid[:, None] & (target < channels)[None, :]
            value = tl.reshape(total, (m, 256)).to(y.dtype.element_ty)
            tl.store(y + targets[:, None] * channels + target[None, :], value, mask)
            total = tl.zeros((m, 2, 128), tl.float32)
