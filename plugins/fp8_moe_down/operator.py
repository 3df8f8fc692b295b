"""Fp8MoEDown: the second half of every chosen expert's MLP in block-scaled FP8."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import for_each_expert, linear, rows, size
from angelforge.plugins.fp8_body import dequantize, dequantize_weight
from angelforge.plugins.operator import Attribute, AttributeRef, Operator, Port


def _body(
    op: OpBuilder,
    inner: ir.Value,
    inner_scale: ir.Value,
    down: ir.Value,
    down_scale: ir.Value,
    expert_offsets: ir.Value,
    dtype: AttributeRef,
) -> ir.Value:
    def compute(op: OpBuilder, inner: ir.Value, start: ir.Value, end: ir.Value, *expert: ir.Value) -> ir.Value:
        return linear(op, rows(op, inner, start, end), dequantize_weight(op, *expert))

    wide = dequantize(op, inner, inner_scale)
    total = size(op, inner, 0)
    result = for_each_expert(op, wide, expert_offsets, [down, down_scale], size(op, down, 1), total, compute)
    return op.Cast(result, to=dtype.as_("to"))


FP8_MOE_DOWN = Operator(
    name="Fp8MoEDown",
    doc="expert_out[r] = inner[r] · down[e]ᵀ for sorted row r of expert e, promoted to f32 after every 128-wide block. "
    "Rows of no expert are 0.",
    inputs=(
        Port("inner", "FLOAT8E4M3FN", ("N", "I")),
        Port("inner_scale", "FLOAT", ("N", "IG")),
        Port("down", "FLOAT8E4M3FN", ("E", "H", "I")),
        Port("down_scale", "FLOAT", ("E", "HG", "IG")),
        Port("expert_offsets", "INT32", ("E1",)),
    ),
    outputs=(Port("expert_out", "dtype", ("N", "H")),),
    attributes=(Attribute("dtype", int, "element type of the output"),),
    body=_body,
)
