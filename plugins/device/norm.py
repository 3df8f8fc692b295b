"""RMSNorm of one row, for the kernels that normalise, add and quantise. A row is a block [groups, 128] of f32.

`groups` is a power of two with groups · 128 ≥ width; channels from `width` on are 0 and never stored.
"""

import triton
import triton.language as tl

from angelforge.plugins.device.numbers import group_scale, quantize, round_to


@triton.jit
def channels_of(groups: tl.constexpr):
    """int32 [groups, 128]: the channel of each place in a row."""
    return tl.arange(0, groups)[:, None] * 128 + tl.arange(0, 128)[None, :]


@triton.jit
def load_row(pointer, row, width: tl.constexpr, groups: tl.constexpr):
    """f32 [groups, 128]: row `row` (int64) of a [., width] tensor."""
    channel = channels_of(groups)
    return tl.load(pointer + row * width + channel, mask=channel < width, other=0.0).to(tl.float32)


@triton.jit
def store_row(pointer, row, value, width: tl.constexpr, groups: tl.constexpr):
    """Rounds to the tensor's type and stores."""
    channel = channels_of(groups)
    tl.store(pointer + row * width + channel, value.to(pointer.dtype.element_ty), mask=channel < width)


@triton.jit
def normalized(x, weight, like: tl.constexpr, width: tl.constexpr, groups: tl.constexpr, epsilon: tl.constexpr):
    """x / √(mean(x²) + ε) in f32, rounded to `like`, times weight, rounded again: f32 values of that type."""
    mean = tl.div_rn(tl.sum(tl.sum(x * x, 1), 0), float(width))
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + epsilon))
    return round_to(round_to(x * inverse, like) * round_to(load_row(weight, 0, width, groups), like), like)


@triton.jit
def store_quantized(quantized, scales, row, value, width: tl.constexpr, groups: tl.constexpr):
    """Quantises a row in groups of 128 and stores values and scales."""
    scale = group_scale(tl.max(tl.abs(value), 1))  # [groups]
    store_row(quantized, row, quantize(value, scale[:, None]), width, groups)
    count: tl.constexpr = (width + 127) // 128
    group = tl.arange(0, groups)
    tl.store(scales + row * count + group, scale, mask=group < count)
