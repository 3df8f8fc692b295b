"""MoERoute: group-limited top-k of the router's logits, weights of the chosen experts; shared experts appended."""

from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import INT32, f32, i64, integer, size, valid_rows, vector
from angelforge.plugins.operator import Attribute, Operator, Port

WORD = 32  # tokens of one int32 of expert_tokens
ROW = 128  # tokens by which rows of expert_tokens grow: 16 bytes


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


def _token_bits(op: OpBuilder, ids: ir.Value, valid: ir.Value, experts: ir.Value) -> ir.Value:
    """int32 [E1, words] of ids int64 [T, k]: see the operator; `valid` bool [T, 1], `experts` int64 [1]."""
    tokens = size(op, ids, 0)
    words = op.Mul(op.Div(op.Add(tokens, [ROW - 1]), [ROW]), [ROW // WORD])
    none = op.ConstantOfShape(
        op.Concat(op.Mul(words, [WORD]), experts, axis=0), value=ir.tensor([0], ir.DataType.INT64)
    )
    present = op.Expand(i64(op, valid), op.Shape(ids))
    hits = op.ScatterElements(none, ids, present, axis=1, reduction="add")  # [words · 32, E1] of 0 and 1
    by_word = op.Reshape(op.Transpose(hits, perm=[1, 0]), op.Concat(experts, words, [WORD], axis=0))
    # The top bit is the sign, so that every sum is an int32.
    places = [1 << bit for bit in range(WORD - 1)] + [-(1 << (WORD - 1))]
    return op.Cast(op.ReduceSum(op.Mul(by_word, places), [2], keepdims=0), to=INT32)


def _body(
    op: OpBuilder, logits: ir.Value, bias: ir.Value, num_tokens: ir.Value, **attributes: Any
) -> tuple[ir.Value, ir.Value, ir.Value]:
    top_k, n_group, topk_group, shared = (
        integer(op, attributes[name]) for name in ("top_k", "n_group", "topk_group", "num_shared_experts")
    )
    scores = op.Sigmoid(logits)  # [T, E]
    candidates = _biased_within_groups(op, op.Add(scores, bias), n_group, topk_group)
    _, routed = op.TopK(candidates, op.Reshape(top_k, [1]), axis=1, _outputs=2)  # [T, k]
    picked = op.GatherElements(scores, routed, axis=1)
    total = op.Add(op.ReduceSum(picked, [1], keepdims=1), 1e-20)
    # The published code leaves a single expert's weight as it is.
    total = op.Where(op.Greater(top_k, 1), total, 1.0)
    routed_weight = op.Mul(
        op.Div(picked, total), op.Constant(value_float=attributes["routed_scaling_factor"].as_("value_float"))
    )

    experts = op.Squeeze(size(op, logits, 1), [0])
    all_experts = op.Add(experts, shared)
    everyone = op.Range(experts, all_experts, 1)  # [S]
    per_token = vector(op, size(op, logits, 0), shared)
    ids = op.Concat(routed, op.Expand(everyone, per_token), axis=1)
    weights = op.Concat(routed_weight, op.Expand(1.0, per_token), axis=1)
    valid = op.Unsqueeze(valid_rows(op, logits, num_tokens), [1])
    bits = _token_bits(op, ids, valid, op.Reshape(all_experts, [1]))
    return op.Cast(op.Where(valid, ids, -1), to=INT32), op.Where(valid, weights, 0.0), bits


MOE_ROUTE = Operator(
    name="MoERoute",
    doc="Selection by sigmoid(logits) + bias within the best topk_group of n_group groups (a group counts as "
    "the sum of its two best), ties to the lower index, order by descending selection score. Weights are the unbiased "
    "sigmoids over (their sum + 1e-20) times routed_scaling_factor (DeepSeek-V3, arXiv 2412.19437, section 2.1.2); "
    "with top_k = 1 they are not divided. Shared experts follow with ids E, E+1, … and weight 1. All in IEEE f32. "
    "Padding rows: expert −1, weight 0. expert_tokens is the same choice by expert: bit t % 32 of word "
    "[e, t // 32] says that token t goes to expert e; rows are padded with 0 to 128 tokens.",
    inputs=(
        Port("logits", "FLOAT", ("T", "E")),
        Port("bias", "FLOAT", ("E",)),
        Port("num_tokens", "INT32", (1,)),
    ),
    outputs=(
        Port("expert_ids", "INT32", ("T", "k")),
        Port("expert_weights", "FLOAT", ("T", "k")),
        Port("expert_tokens", "INT32", ("E1", "words")),
    ),
    attributes=(
        Attribute("top_k", int, "routed experts per token"),
        Attribute("n_group", int),
        Attribute("topk_group", int),
        Attribute("num_shared_experts", int),
        Attribute("routed_scaling_factor", float),
    ),
    derive={
        "k": lambda d: d["top_k"] + d["num_shared_experts"],
        "E1": lambda d: d["E"] + d["num_shared_experts"],
        "words": lambda d: (d["T"] + (ROW - 1)) // ROW * (ROW // WORD),
    },
    body=_body,
)
