"""Fp8MoEGateUp: the first half of every chosen expert's SwiGLU MLP in block-scaled FP8, requantised."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import linear, size, swiglu
from angelforge.plugins.fp8_body import BLOCK, dequantize, dequantize_weight, quantize
from angelforge.plugins.moe_body import for_each_expert, token_of_entry
from angelforge.plugins.operator import Operator, Port


def _body(
    op: OpBuilder,
    x: ir.Value,
    x_scale: ir.Value,
    gate: ir.Value,
    gate_scale: ir.Value,
    up: ir.Value,
    up_scale: ir.Value,
    expert_ids: ir.Value,
    expert_tokens: ir.Value,
) -> tuple[ir.Value, ir.Value]:
    wide, width = dequantize(op, x, x_scale), size(op, gate, 1)

    def compute(op: OpBuilder, entries: ir.Value, *expert: ir.Value) -> ir.Value:
        gate, gate_scale, up, up_scale = expert
        own = op.Gather(wide, token_of_entry(op, entries, expert_ids), axis=0)
        gated = linear(op, own, dequantize_weight(op, gate, gate_scale))
        return swiglu(op, gated, linear(op, own, dequantize_weight(op, up, up_scale)))

    inner = for_each_expert(op, expert_ids, [gate, gate_scale, up, up_scale], width, compute)
    quantized, scale = quantize(op, op.Reshape(inner, op.Concat([-1], width, axis=0)))
    entries = op.Shape(expert_ids)
    return (
        op.Reshape(quantized, op.Concat(entries, width, axis=0)),
        op.Reshape(scale, op.Concat(entries, size(op, scale, 1), axis=0)),
    )


FP8_MOE_GATE_UP = Operator(
    name="Fp8MoEGateUp",
    doc="inner, inner_scale [t, j] = silu(x[t] · gate[e]ᵀ) · (x[t] · up[e]ᵀ) in e4m3 by groups of 128, for expert e = "
    "expert_ids[t, j]; f32 between matmul, SwiGLU and requantisation. Entries that name no expert are 0. "
    "expert_tokens says the same as expert_ids, as MoERoute describes it.",
    inputs=(
        Port("x", "FLOAT8E4M3FN", ("T", "H")),
        Port("x_scale", "FLOAT", ("T", "HG")),
        Port("gate", "FLOAT8E4M3FN", ("E", "I", "H")),
        Port("gate_scale", "FLOAT", ("E", "IG", "HG")),
        Port("up", "FLOAT8E4M3FN", ("E", "I", "H")),
        Port("up_scale", "FLOAT", ("E", "IG", "HG")),
        Port("expert_ids", "INT32", ("T", "k")),
        Port("expert_tokens", "INT32", ("E", "words")),
    ),
    outputs=(Port("inner", "FLOAT8E4M3FN", ("T", "k", "I")), Port("inner_scale", "FLOAT", ("T", "k", "G"))),
    derive={"G": lambda d: (d["I"] + (BLOCK - 1)) // BLOCK},
    body=_body,
)
