"""Block-wise FP8 in standard ONNX nodes (DESIGN.md, precision): exactly the rounding that kernels must show.

An activation [T, K] is e4m3 values with one f32 scale per token and 128 channels; a weight [N, K] is e4m3 values with
one f32 scale per 128×128 block. K and N need not be multiples of 128.
"""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import f32, size

BLOCK = 128
FP8_MAX = 448.0  # largest finite e4m3fn value
LEAST_AMAX = 1e-10


def quantize(op: OpBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """x [T, K] → (e4m3 [T, K], f32 [T, ⌈K/128⌉]): s = max(amax, 1e-10)/448, q = RNE(x/s) saturated to ±448."""
    channels = size(op, x, 1)
    groups = op.Div(op.Add(channels, [BLOCK - 1]), [BLOCK])
    missing = op.Sub(op.Mul(groups, [BLOCK]), channels)
    padded = op.Pad(f32(op, x), op.Concat([0, 0, 0], missing, axis=0))
    grouped = op.Reshape(padded, op.Concat(size(op, x, 0), groups, [BLOCK], axis=0))
    amax = op.ReduceMax(op.Abs(grouped), [2], keepdims=1)
    scale = op.Div(op.Max(amax, LEAST_AMAX), FP8_MAX)  # [T, G, 1]
    levels = op.Clip(op.Div(grouped, scale), -FP8_MAX, FP8_MAX)
    # FP8 tensors cannot be sliced, so the padding goes before the cast.
    kept = op.Slice(op.Reshape(levels, op.Shape(padded)), [0], channels, [1])
    return op.Cast(kept, to=ir.DataType.FLOAT8E4M3FN, saturate=1), op.Squeeze(scale, [2])


def dequantize(op: OpBuilder, quantized: ir.Value, scale: ir.Value) -> ir.Value:
    """(e4m3 [T, K], f32 [T, ⌈K/128⌉]) → f32 [T, K]."""
    return op.DequantizeLinear(quantized, scale, axis=1, block_size=BLOCK)


def dequantize_weight(op: OpBuilder, weight: ir.Value, scale: ir.Value) -> ir.Value:
    """(e4m3 [N, K], f32 [⌈N/128⌉, ⌈K/128⌉]) → f32 [N, K]."""
    block_of_row = op.Div(op.Range(0, op.Squeeze(size(op, weight, 0), [0]), 1), BLOCK)
    return op.DequantizeLinear(weight, op.Gather(scale, block_of_row, axis=0), axis=1, block_size=BLOCK)
