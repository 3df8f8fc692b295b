"""AllReduce: the sum over ranks; with one rank the identity, which is also its body."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.operator import Operator, Port


def _body(op: OpBuilder, x: ir.Value) -> ir.Value:
    return op.Identity(x)


ALL_REDUCE = Operator(
    name="AllReduce",
    doc="y = sum of x over all ranks. Builders remove it for one rank.",
    inputs=(Port("x", "A", ("T", "H")),),
    outputs=(Port("y", "A", ("T", "H")),),
    types={"A": ("FLOAT", "BFLOAT16")},
    body=_body,
)
