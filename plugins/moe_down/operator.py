"""MoEDown: the second half of every chosen expert's MLP."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import linear, size
from angelforge.plugins.moe_body import for_each_expert
from angelforge.plugins.operator import Operator, Port


def _body(op: OpBuilder, inner: ir.Value, down: ir.Value, expert_ids: ir.Value, expert_tokens: ir.Value) -> ir.Value:
    flat = op.Reshape(inner, op.Concat([-1], size(op, inner, 2), axis=0))

    def compute(op: OpBuilder, entries: ir.Value, down: ir.Value) -> ir.Value:
        return linear(op, op.Gather(flat, entries, axis=0), down)

    result = for_each_expert(op, expert_ids, [down], size(op, down, 1), compute)
    return op.CastLike(result, inner)


MOE_DOWN = Operator(
    name="MoEDown",
    doc="expert_out[t, j] = inner[t, j] · down[e]ᵀ for expert e = expert_ids[t, j], f32 sums. Entries that name no "
    "expert are 0. expert_tokens says the same as expert_ids, as MoERoute describes it.",
    inputs=(
        Port("inner", "A", ("T", "k", "I")),
        Port("down", "W", ("E", "H", "I")),
        Port("expert_ids", "INT32", ("T", "k")),
        Port("expert_tokens", "INT32", ("E", "words")),
    ),
    outputs=(Port("expert_out", "A", ("T", "k", "H")),),
    types={"A": ("FLOAT", "BFLOAT16"), "W": ("FLOAT", "BFLOAT16")},
    body=_body,
)
