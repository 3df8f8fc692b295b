"""AddNormQuantize: residual addition, RMSNorm, and the FP8 form for the matmul that follows."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.fp8_body import BLOCK, quantize
from angelforge.plugins.norm.operator import rms_norm
from angelforge.plugins.operator import Attribute, AttributeRef, Operator, Port


def _body(
    op: OpBuilder, residual: ir.Value, delta: ir.Value, weight: ir.Value, epsilon: AttributeRef
) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    total = op.Add(residual, delta)
    normed = rms_norm(op, total, weight, epsilon)
    return total, normed, *quantize(op, normed)


ADD_NORM_QUANTIZE = Operator(
    name="AddNormQuantize",
    doc="residual_out = residual + delta and normed = RMSNorm(residual_out) · weight, each rounded to its type; "
    "quantized, scale = normed in e4m3 by groups of 128.",
    inputs=(Port("residual", "A", ("T", "H")), Port("delta", "A", ("T", "H")), Port("weight", "W", ("H",))),
    outputs=(
        Port("residual_out", "A", ("T", "H")),
        Port("normed", "A", ("T", "H")),
        Port("quantized", "FLOAT8E4M3FN", ("T", "H")),
        Port("scale", "FLOAT", ("T", "G")),
    ),
    attributes=(Attribute("epsilon", float, "added to the mean square"),),
    types={"A": ("FLOAT", "BFLOAT16"), "W": ("FLOAT", "BFLOAT16")},
    derive={"G": lambda d: (d["H"] + (BLOCK - 1)) // BLOCK},
    body=_body,
)
