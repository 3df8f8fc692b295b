"""Fp8MoEDown: the second half of every chosen expert's MLP in block-scaled FP8."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import linear, size
from angelforge.plugins.fp8_body import dequantize, dequantize_weight
from angelforge.plugins.moe_body import for_each_expert
from angelforge.plugins.operator import Attribute, AttributeRef, Operator, Port


def _body(
    op: OpBuilder,
    inner: ir.Value,
    inner_scale: ir.Value,
    down: ir.Value,
    down_scale: ir.Value,
    expert_ids: ir.Value,
    expert_tokens: ir.Value,
    dtype: AttributeRef,
) -> ir.Value:
    quantized, scale = (op.Reshape(v, op.Concat([-1], size(op, v, 2), axis=0)) for v in (inner, inner_scale))
    flat = dequantize(op, quantized, scale)  # [T·k, I]

    def compute(op: OpBuilder, entries: ir.Value, *expert: ir.Value) -> ir.Value:
        return linear(op, op.Gather(flat, entries, axis=0), dequantize_weight(op, *expert))

    result = for_each_expert(op, expert_ids, [down, down_scale], size(op, down, 1), compute)
    return op.Cast(result, to=dtype.as_("to"))


FP8_MOE_DOWN = Operator(
    name="Fp8MoEDown",
    doc="expert_out[t, j] = inner[t, j] · down[e]ᵀ for expert e = expert_ids[t, j], promoted to f32 after every "
    "128-wide block. Entries that name no expert are 0. expert_tokens says the same as expert_ids, as MoERoute "
    "describes it.",
    inputs=(
        Port("inner", "FLOAT8E4M3FN", ("T", "k", "I")),
        Port("inner_scale", "FLOAT", ("T", "k", "IG")),
        Port("down", "FLOAT8E4M3FN", ("E", "H", "I")),
        Port("down_scale", "FLOAT", ("E", "HG", "IG")),
        Port("expert_ids", "INT32", ("T", "k")),
        Port("expert_tokens", "INT32", ("E", "words")),
    ),
    outputs=(Port("expert_out", "dtype", ("T", "k", "H")),),
    attributes=(Attribute("dtype", int, "element type of the output"),),
    body=_body,
)
