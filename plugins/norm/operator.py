"""Norm: RMSNorm of the first residual stream."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.operator import Attribute, AttributeRef, Operator, Port


def rms_norm(op: OpBuilder, x: ir.Value, weight: ir.Value, epsilon: AttributeRef) -> ir.Value:
    """x / √(mean(x²) + ε) in f32, cast to x's type, times weight (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    return op.RMSNormalization(x, op.CastLike(weight, x), epsilon=epsilon.as_("epsilon"), stash_type=1)


NORM = Operator(
    name="Norm",
    doc="normed = RMSNorm(hidden) · weight.",
    inputs=(Port("hidden", "A", ("T", "H")), Port("weight", "W", ("H",))),
    outputs=(Port("normed", "A", ("T", "H")),),
    attributes=(Attribute("epsilon", float, "added to the mean square"),),
    types={"A": ("FLOAT", "BFLOAT16"), "W": ("FLOAT", "BFLOAT16")},
    body=rms_norm,
)
