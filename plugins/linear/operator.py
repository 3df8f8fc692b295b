"""Linear: x · Wᵀ with f32 accumulation."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import linear
from angelforge.plugins.operator import Attribute, AttributeRef, Operator, Port


def _body(op: OpBuilder, x: ir.Value, weight: ir.Value, dtype: AttributeRef) -> ir.Value:
    return op.Cast(linear(op, x, weight), to=dtype.as_("to"))


LINEAR = Operator(
    name="Linear",
    doc="y = x · weightᵀ, accumulated in f32 and rounded once to the output type (f32 for the head).",
    inputs=(Port("x", "A", ("T", "K")), Port("weight", "W", ("N", "K"))),
    outputs=(Port("y", "dtype", ("T", "N")),),
    attributes=(Attribute("dtype", int, "element type of the output"),),
    types={"A": ("FLOAT", "BFLOAT16"), "W": ("FLOAT", "BFLOAT16")},
    body=_body,
)
