"""AttentionMergeQuantize: AttentionMerge, and the FP8 form for the projection that follows."""

from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.attention_merge.operator import ATTRIBUTES, INPUTS, merge
from angelforge.plugins.fp8_body import BLOCK, quantize
from angelforge.plugins.operator import Operator, Port


def _body(op: OpBuilder, *inputs: Any, **attributes: Any) -> tuple[ir.Value, ir.Value]:
    return quantize(op, merge(op, *inputs, **attributes))


ATTENTION_MERGE_QUANTIZE = Operator(
    name="AttentionMergeQuantize",
    doc="AttentionMerge's result, rounded to the type of direct, in e4m3 by groups of 128.",
    inputs=INPUTS,
    outputs=(Port("quantized", "FLOAT8E4M3FN", ("T", "W")), Port("scale", "FLOAT", ("T", "G"))),
    attributes=ATTRIBUTES,
    types={"A": ("FLOAT", "BFLOAT16")},
    derive={
        "W": lambda d: d["Hq"] * d["D"],
        "G": lambda d: (d["Hq"] * d["D"] + (BLOCK - 1)) // BLOCK,
    },
    body=_body,
)
