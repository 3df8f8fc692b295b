"""Fp8MoEGateUp: the first half of every chosen expert's SwiGLU MLP in block-scaled FP8, requantised."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import for_each_expert, i64, integer, linear, rows, size, swiglu
from angelforge.plugins.fp8_body import BLOCK, dequantize, dequantize_weight, quantize
from angelforge.plugins.operator import Attribute, AttributeRef, Operator, Port


def _body(
    op: OpBuilder,
    x: ir.Value,
    x_scale: ir.Value,
    gate: ir.Value,
    gate_scale: ir.Value,
    up: ir.Value,
    up_scale: ir.Value,
    expert_offsets: ir.Value,
    order: ir.Value,
    experts_per_token: AttributeRef,
) -> tuple[ir.Value, ir.Value]:
    token = op.Div(i64(op, order), integer(op, experts_per_token))

    def compute(op: OpBuilder, x: ir.Value, start: ir.Value, end: ir.Value, *expert: ir.Value) -> ir.Value:
        gate, gate_scale, up, up_scale = expert
        own = op.Gather(x, rows(op, token, start, end), axis=0)
        gated = linear(op, own, dequantize_weight(op, gate, gate_scale))
        return swiglu(op, gated, linear(op, own, dequantize_weight(op, up, up_scale)))

    weights = [gate, gate_scale, up, up_scale]
    wide = dequantize(op, x, x_scale)
    inner = for_each_expert(op, wide, expert_offsets, weights, size(op, gate, 1), size(op, order, 0), compute)
    return quantize(op, inner)


FP8_MOE_GATE_UP = Operator(
    name="Fp8MoEGateUp",
    doc="inner, inner_scale [r] = silu(x[t] · gate[e]ᵀ) · (x[t] · up[e]ᵀ) in e4m3 by groups of 128, for sorted row r "
    "of token t = order[r] // experts_per_token and expert e; f32 between matmul, SwiGLU and requantisation. Rows of "
    "no expert are 0.",
    inputs=(
        Port("x", "FLOAT8E4M3FN", ("T", "H")),
        Port("x_scale", "FLOAT", ("T", "HG")),
        Port("gate", "FLOAT8E4M3FN", ("E", "I", "H")),
        Port("gate_scale", "FLOAT", ("E", "IG", "HG")),
        Port("up", "FLOAT8E4M3FN", ("E", "I", "H")),
        Port("up_scale", "FLOAT", ("E", "IG", "HG")),
        Port("expert_offsets", "INT32", ("E1",)),
        Port("order", "INT32", ("N",)),
    ),
    outputs=(Port("inner", "FLOAT8E4M3FN", ("N", "I")), Port("inner_scale", "FLOAT", ("N", "G"))),
    attributes=(Attribute("experts_per_token", int, "entries a token has in order"),),
    derive={"G": lambda d: (d["I"] + (BLOCK - 1)) // BLOCK},
    body=_body,
)
