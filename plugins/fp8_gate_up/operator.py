"""Fp8GateUp: the first half of a dense SwiGLU MLP in block-scaled FP8, requantised."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import linear, swiglu
from angelforge.plugins.fp8_body import BLOCK, dequantize, dequantize_weight, quantize
from angelforge.plugins.operator import Operator, Port


def _body(
    op: OpBuilder,
    x: ir.Value,
    x_scale: ir.Value,
    gate: ir.Value,
    gate_scale: ir.Value,
    up: ir.Value,
    up_scale: ir.Value,
) -> tuple[ir.Value, ir.Value]:
    wide = dequantize(op, x, x_scale)
    gated = linear(op, wide, dequantize_weight(op, gate, gate_scale))
    return quantize(op, swiglu(op, gated, linear(op, wide, dequantize_weight(op, up, up_scale))))


FP8_GATE_UP = Operator(
    name="Fp8GateUp",
    doc="inner, inner_scale = silu(x · gateᵀ) · (x · upᵀ) in e4m3 by groups of 128; f32 between matmul, SwiGLU and "
    "requantisation.",
    inputs=(
        Port("x", "FLOAT8E4M3FN", ("T", "H")),
        Port("x_scale", "FLOAT", ("T", "HG")),
        Port("gate", "FLOAT8E4M3FN", ("F", "H")),
        Port("gate_scale", "FLOAT", ("FG", "HG")),
        Port("up", "FLOAT8E4M3FN", ("F", "H")),
        Port("up_scale", "FLOAT", ("FG", "HG")),
    ),
    outputs=(Port("inner", "FLOAT8E4M3FN", ("T", "F")), Port("inner_scale", "FLOAT", ("T", "G"))),
    derive={"G": lambda d: (d["F"] + (BLOCK - 1)) // BLOCK},
    body=_body,
)
