"""MoEDown: the second half of every chosen expert's MLP."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import for_each_expert, linear, rows, size
from angelforge.plugins.operator import Operator, Port


def _body(op: OpBuilder, inner: ir.Value, down: ir.Value, expert_offsets: ir.Value) -> ir.Value:
    def compute(op: OpBuilder, inner: ir.Value, start: ir.Value, end: ir.Value, down: ir.Value) -> ir.Value:
        return linear(op, rows(op, inner, start, end), down)

    result = for_each_expert(op, inner, expert_offsets, [down], size(op, down, 1), size(op, inner, 0), compute)
    return op.CastLike(result, inner)


MOE_DOWN = Operator(
    name="MoEDown",
    doc="expert_out[r] = inner[r] · down[e]ᵀ for sorted row r of expert e, f32 sums. Rows of no expert are 0.",
    inputs=(
        Port("inner", "A", ("N", "I")),
        Port("down", "W", ("E", "H", "I")),
        Port("expert_offsets", "INT32", ("E1",)),
    ),
    outputs=(Port("expert_out", "A", ("N", "H")),),
    types={"A": ("FLOAT", "BFLOAT16"), "W": ("FLOAT", "BFLOAT16")},
    body=_body,
)
