"""MoEGateUp: the first half of every chosen expert's SwiGLU MLP."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import for_each_expert, i64, integer, linear, rows, size, swiglu
from angelforge.plugins.operator import Attribute, AttributeRef, Operator, Port


def _body(
    op: OpBuilder,
    x: ir.Value,
    gate: ir.Value,
    up: ir.Value,
    expert_offsets: ir.Value,
    order: ir.Value,
    experts_per_token: AttributeRef,
) -> ir.Value:
    token = op.Div(i64(op, order), integer(op, experts_per_token))

    def compute(op: OpBuilder, x: ir.Value, start: ir.Value, end: ir.Value, gate: ir.Value, up: ir.Value) -> ir.Value:
        own = op.Gather(x, rows(op, token, start, end), axis=0)
        return swiglu(op, linear(op, own, gate), linear(op, own, up))

    inner = for_each_expert(op, x, expert_offsets, [gate, up], size(op, gate, 1), size(op, order, 0), compute)
    return op.CastLike(inner, x)


MOE_GATE_UP = Operator(
    name="MoEGateUp",
    doc="inner[r] = silu(x[t] · gate[e]ᵀ) · (x[t] · up[e]ᵀ) for sorted row r of token t = order[r] // "
    "experts_per_token and expert e; f32 inside, rounded once. Rows of no expert are 0.",
    inputs=(
        Port("x", "A", ("T", "H")),
        Port("gate", "W", ("E", "I", "H")),
        Port("up", "W", ("E", "I", "H")),
        Port("expert_offsets", "INT32", ("E1",)),
        Port("order", "INT32", ("N",)),
    ),
    outputs=(Port("inner", "A", ("N", "I")),),
    attributes=(Attribute("experts_per_token", int, "entries a token has in order"),),
    types={"A": ("FLOAT", "BFLOAT16"), "W": ("FLOAT", "BFLOAT16")},
    body=_body,
)
