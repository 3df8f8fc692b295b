"""MoECombine: the weighted sum over each token's experts."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import f32, i64, integer, rows
from angelforge.plugins.operator import Attribute, AttributeRef, Operator, Port


def _body(
    op: OpBuilder, expert_out: ir.Value, position: ir.Value, expert_weights: ir.Value, num_shared_experts: AttributeRef
) -> ir.Value:
    own = op.Gather(f32(op, expert_out), i64(op, position), axis=0)  # [T·k, H]
    per_token = op.Reshape(own, op.Concat(op.Shape(expert_weights), [-1], axis=0))  # [T, k, H]
    weighted = op.Mul(per_token, op.Unsqueeze(expert_weights, [2]))
    first_shared = op.Sub(op.Shape(expert_weights, start=1, end=2), integer(op, num_shared_experts))

    def total(start: ir.Value | int, end: ir.Value | int) -> ir.Value:
        # Rounded to the activation type before the other part is added, as the model does.
        return op.CastLike(op.ReduceSum(rows(op, weighted, start, end, axis=1), [1], keepdims=0), expert_out)

    return op.Add(total(0, first_shared), total(first_shared, 2**62))


MOE_COMBINE = Operator(
    name="MoECombine",
    doc="mixed[t] = Σ_j expert_weights[t, j] · expert_out[position[t·k + j]], in f32 and in the order of j; routed and "
    "shared parts are each rounded once, then added.",
    inputs=(
        Port("expert_out", "A", ("N", "H")),
        Port("position", "INT32", ("N",)),
        Port("expert_weights", "FLOAT", ("T", "k")),
    ),
    outputs=(Port("mixed", "A", ("T", "H")),),
    attributes=(Attribute("num_shared_experts", int, "the last entries of each token"),),
    types={"A": ("FLOAT", "BFLOAT16")},
    body=_body,
)
