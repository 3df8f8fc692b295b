"""MoELogits: what the router thinks of every expert."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import linear
from angelforge.plugins.operator import Operator, Port


def _body(op: OpBuilder, hidden: ir.Value, weight: ir.Value) -> ir.Value:
    return linear(op, hidden, weight)


MOE_LOGITS = Operator(
    name="MoELogits",
    doc="logits = hidden · weightᵀ in IEEE f32 (no TF32), hidden widened.",
    inputs=(Port("hidden", "A", ("T", "H")), Port("weight", "FLOAT", ("E", "H"))),
    outputs=(Port("logits", "FLOAT", ("T", "E")),),
    types={"A": ("FLOAT", "BFLOAT16")},
    body=_body,
)
