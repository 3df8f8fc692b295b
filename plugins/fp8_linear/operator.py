"""Fp8Linear: x · Wᵀ with block-scaled FP8 on both sides."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import linear
from angelforge.plugins.fp8_body import dequantize, dequantize_weight
from angelforge.plugins.operator import Attribute, AttributeRef, Operator, Port


def _body(
    op: OpBuilder, x: ir.Value, x_scale: ir.Value, weight: ir.Value, weight_scale: ir.Value, dtype: AttributeRef
) -> ir.Value:
    y = linear(op, dequantize(op, x, x_scale), dequantize_weight(op, weight, weight_scale))
    return op.Cast(y, to=dtype.as_("to"))


FP8_LINEAR = Operator(
    name="Fp8Linear",
    doc="y = Σ over 128-wide blocks g of x_scale[:, g] · weight_scale[:, g] · (x[g] · weight[g]ᵀ), promoted to f32 "
    "after every block, rounded once to the output type.",
    inputs=(
        Port("x", "FLOAT8E4M3FN", ("T", "K")),
        Port("x_scale", "FLOAT", ("T", "KG")),
        Port("weight", "FLOAT8E4M3FN", ("N", "K")),
        Port("weight_scale", "FLOAT", ("NG", "KG")),
    ),
    outputs=(Port("y", "dtype", ("T", "N")),),
    attributes=(Attribute("dtype", int, "element type of the output"),),
    body=_body,
)
