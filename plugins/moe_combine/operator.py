"""MoECombine: the weighted sum over each token's experts."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import f32, integer, rows
from angelforge.plugins.operator import Attribute, AttributeRef, Operator, Port


def _body(op: OpBuilder, expert_out: ir.Value, expert_weights: ir.Value, num_shared_experts: AttributeRef) -> ir.Value:
    weighted = op.Mul(f32(op, expert_out), op.Unsqueeze(expert_weights, [2]))  # [T, k, H]
    first_shared = op.Sub(op.Shape(expert_weights, start=1, end=2), integer(op, num_shared_experts))

    def total(start: ir.Value | int, end: ir.Value | int) -> ir.Value:
        # Rounded to the activation type before the other part is added, as the model does.
        return op.CastLike(op.ReduceSum(rows(op, weighted, start, end, axis=1), [1], keepdims=0), expert_out)

    return op.Add(total(0, first_shared), total(first_shared, 2**62))


MOE_COMBINE = Operator(
    name="MoECombine",
    doc="mixed[t] = Σ_j expert_weights[t, j] · expert_out[t, j], in f32 and in the order of j; routed and shared parts "
    "are each rounded once, then added.",
    inputs=(Port("expert_out", "A", ("T", "k", "H")), Port("expert_weights", "FLOAT", ("T", "k"))),
    outputs=(Port("mixed", "A", ("T", "H")),),
    attributes=(Attribute("num_shared_experts", int, "the last entries of each token"),),
    types={"A": ("FLOAT", "BFLOAT16")},
    body=_body,
)
