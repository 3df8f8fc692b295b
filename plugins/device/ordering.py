"""f32 numbers as integers of the same order: what is compared, counted and searched for without rounding.

IEEE 754 orders positive numbers as their bits; those of negative numbers are turned around.
"""

import triton
import triton.language as tl

NO_KEY = tl.constexpr(-0x80000000)  # below every number's
MINUS_INFINITY = tl.constexpr(-0x7F800001)
INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def float_key(x):
    """int32 in the order of the f32 values x; −0 counts as 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_float(key):
    """The f32 values of keys."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
