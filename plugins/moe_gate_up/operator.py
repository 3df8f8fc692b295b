"""MoEGateUp: the first half of every chosen expert's SwiGLU MLP."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import linear, size, swiglu
from angelforge.plugins.moe_body import for_each_expert, token_of_entry
from angelforge.plugins.operator import Operator, Port


def _body(
    op: OpBuilder, x: ir.Value, gate: ir.Value, up: ir.Value, expert_ids: ir.Value, expert_tokens: ir.Value
) -> ir.Value:
    def compute(op: OpBuilder, entries: ir.Value, gate: ir.Value, up: ir.Value) -> ir.Value:
        own = op.Gather(x, token_of_entry(op, entries, expert_ids), axis=0)
        return swiglu(op, linear(op, own, gate), linear(op, own, up))

    inner = for_each_expert(op, expert_ids, [gate, up], size(op, gate, 1), compute)
    return op.CastLike(inner, x)


MOE_GATE_UP = Operator(
    name="MoEGateUp",
    doc="inner[t, j] = silu(x[t] · gate[e]ᵀ) · (x[t] · up[e]ᵀ) for expert e = expert_ids[t, j]; f32 inside, rounded "
    "once. Entries that name no expert are 0. expert_tokens says the same as expert_ids, as MoERoute describes it.",
    inputs=(
        Port("x", "A", ("T", "H")),
        Port("gate", "W", ("E", "I", "H")),
        Port("up", "W", ("E", "I", "H")),
        Port("expert_ids", "INT32", ("T", "k")),
        Port("expert_tokens", "INT32", ("E", "words")),
    ),
    outputs=(Port("inner", "A", ("T", "k", "I")),),
    types={"A": ("FLOAT", "BFLOAT16"), "W": ("FLOAT", "BFLOAT16")},
    body=_body,
)
