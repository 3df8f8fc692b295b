"""GateUp: the first half of a dense SwiGLU MLP."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import linear, swiglu
from angelforge.plugins.operator import Operator, Port


def _body(op: OpBuilder, x: ir.Value, gate: ir.Value, up: ir.Value) -> ir.Value:
    return op.CastLike(swiglu(op, linear(op, x, gate), linear(op, x, up)), x)


GATE_UP = Operator(
    name="GateUp",
    doc="inner = silu(x · gateᵀ) · (x · upᵀ), f32 inside, rounded once.",
    inputs=(Port("x", "A", ("T", "H")), Port("gate", "W", ("F", "H")), Port("up", "W", ("F", "H"))),
    outputs=(Port("inner", "A", ("T", "F")),),
    types={"A": ("FLOAT", "BFLOAT16"), "W": ("FLOAT", "BFLOAT16")},
    body=_body,
)
