"""Rounding rules that kernels share with the function bodies (DESIGN.md, precision)."""

import triton
import triton.language as tl


@triton.jit
def round_to(x, like: tl.constexpr):
    """f32 values rounded to the type `like`, in f32 again."""
    return x.to(like).to(tl.float32)


@triton.jit
def group_scale(amax):
    """The f32 scale of a group of channels from its largest magnitude: max(amax, 1e-10) / 448 in IEEE division."""
    return tl.div_rn(tl.maximum(amax, 1e-10), 448.0)


@triton.jit
def quantize(x, scale):
    """e4m3 of x / scale (f32, of equal shapes): IEEE division, rounded to nearest even, saturated to ±448.

    NaN stays NaN: a GPU's ordinary minimum would make 448 of it, and nothing behind would show that something broke.
    """
    return tl.clamp(tl.div_rn(x, scale), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def swiglu(gate, up):
    """silu(gate) · up in f32, as the body computes it: 0 for gates far below 0, infinite only where the product is."""
    return gate * (1.0 / (1.0 + tl.exp(-gate))) * up


@triton.jit
def opaque(value, unknown):
    """`value` for every `unknown` ≥ 0, hidden from ptxas, which unrolls loops of known length completely.

    A decode step runs some 300 different launches; code that does not fit the instruction cache is read again by each.
    """
    return value + tl.minimum(unknown, 0)
