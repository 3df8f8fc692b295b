"""MoERoute: router logits, group-limited top-k, weights of the chosen experts; shared experts appended."""

from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import INT32, f32, integer, linear, size, valid_rows, vector
from angelforge.plugins.operator import Attribute, Operator, Port


def _biased_within_groups(op: OpBuilder, biased: ir.Value, n_group: ir.Value, topk_group: ir.Value) -> ir.Value:
    """biased [T, E] with −inf outside the topk_group best groups; a group counts as the sum of its two best scores."""
    grouped = op.Reshape(biased, vector(op, 0, n_group, -1))  # [T, G, E/G]
    best, _ = op.TopK(grouped, op.Min(size(op, grouped, 2), [2]), axis=2, _outputs=2)
    group_score = op.ReduceSum(best, [2], keepdims=0)  # [T, G]
    _, chosen = op.TopK(group_score, op.Reshape(topk_group, [1]), axis=1, _outputs=2)
    closed = op.Mul(group_score, 0.0)
    opened = op.ScatterElements(closed, chosen, op.Add(op.Mul(f32(op, chosen), 0.0), 1.0), axis=1)
    kept = op.Where(op.Greater(op.Unsqueeze(opened, [2]), 0.5), grouped, float("-inf"))
    return op.Reshape(kept, op.Shape(biased))


def _body(
    op: OpBuilder, hidden: ir.Value, weight: ir.Value, bias: ir.Value, num_tokens: ir.Value, **attributes: Any
) -> tuple[ir.Value, ir.Value]:
    top_k, n_group, topk_group, shared = (
        integer(op, attributes[name]) for name in ("top_k", "n_group", "topk_group", "num_shared_experts")
    )
    scores = op.Sigmoid(linear(op, hidden, weight))  # [T, E]
    candidates = _biased_within_groups(op, op.Add(scores, bias), n_group, topk_group)
    _, routed = op.TopK(candidates, op.Reshape(top_k, [1]), axis=1, _outputs=2)  # [T, k]
    picked = op.GatherElements(scores, routed, axis=1)
    total = op.Add(op.ReduceSum(picked, [1], keepdims=1), 1e-20)
    # The published code leaves a single expert's weight as it is.
    total = op.Where(op.Greater(top_k, 1), total, 1.0)
    routed_weight = op.Mul(
        op.Div(picked, total), op.Constant(value_float=attributes["routed_scaling_factor"].as_("value_float"))
    )

    experts = op.Squeeze(size(op, weight, 0), [0])
    everyone = op.Range(experts, op.Add(experts, shared), 1)  # [S]
    per_token = vector(op, size(op, hidden, 0), shared)
    ids = op.Concat(routed, op.Expand(everyone, per_token), axis=1)
    weights = op.Concat(routed_weight, op.Expand(1.0, per_token), axis=1)
    valid = op.Unsqueeze(valid_rows(op, hidden, num_tokens), [1])
    return op.Cast(op.Where(valid, ids, -1), to=INT32), op.Where(valid, weights, 0.0)


MOE_ROUTE = Operator(
    name="MoERoute",
    doc="Selection by sigmoid(hidden · weightᵀ) + bias within the best topk_group of n_group groups (a group counts as "
    "the sum of its two best), ties to the lower index, order by descending selection score. Weights are the unbiased "
    "sigmoids over (their sum + 1e-20) times routed_scaling_factor (DeepSeek-V3, arXiv 2412.19437, section 2.1.2); "
    "with top_k = 1 they are not divided. Shared experts follow with ids E, E+1, … and weight 1. All in IEEE f32. "
    "Padding rows: expert −1, weight 0.",
    inputs=(
        Port("hidden", "A", ("T", "H")),
        Port("weight", "FLOAT", ("E", "H")),
        Port("bias", "FLOAT", ("E",)),
        Port("num_tokens", "INT32", (1,)),
    ),
    outputs=(Port("expert_ids", "INT32", ("T", "k")), Port("expert_weights", "FLOAT", ("T", "k"))),
    attributes=(
        Attribute("top_k", int, "routed experts per token"),
        Attribute("n_group", int),
        Attribute("topk_group", int),
        Attribute("num_shared_experts", int),
        Attribute("routed_scaling_factor", float),
    ),
    types={"A": ("FLOAT", "BFLOAT16")},
    derive={"k": lambda d: d["top_k"] + d["num_shared_experts"]},
    body=_body,
)
