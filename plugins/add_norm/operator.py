"""AddNorm: the residual addition and the RMSNorm that follows it."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.norm.operator import rms_norm
from angelforge.plugins.operator import Attribute, AttributeRef, Operator, Port


def _body(
    op: OpBuilder, residual: ir.Value, delta: ir.Value, weight: ir.Value, epsilon: AttributeRef
) -> tuple[ir.Value, ir.Value]:
    total = op.Add(residual, delta)
    return total, rms_norm(op, total, weight, epsilon)


ADD_NORM = Operator(
    name="AddNorm",
    doc="residual_out = residual + delta, rounded to its type; normed = RMSNorm(residual_out) · weight.",
    inputs=(Port("residual", "A", ("T", "H")), Port("delta", "A", ("T", "H")), Port("weight", "W", ("H",))),
    outputs=(Port("residual_out", "A", ("T", "H")), Port("normed", "A", ("T", "H"))),
    attributes=(Attribute("epsilon", float, "added to the mean square"),),
    types={"A": ("FLOAT", "BFLOAT16"), "W": ("FLOAT", "BFLOAT16")},
    body=_body,
)
