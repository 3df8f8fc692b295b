"""Embedding: rows of the vocabulary table; ids outside the table give zeros."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import size
from angelforge.plugins.operator import Attribute, AttributeRef, Operator, Port


def _body(op: OpBuilder, input_ids: ir.Value, table: ir.Value, dtype: AttributeRef) -> ir.Value:
    last = op.Sub(size(op, table, 0), [1])
    clamped = op.Max(op.Min(input_ids, last), [0])
    inside = op.Unsqueeze(op.Equal(clamped, input_ids), [1])
    found = op.Cast(op.Gather(table, clamped, axis=0), to=dtype.as_("to"))
    return op.Where(inside, found, op.CastLike(0.0, found))


EMBEDDING = Operator(
    name="Embedding",
    doc="hidden[t] = table[input_ids[t]], 0 where the id is outside the table (with the vocabulary split over ranks, "
    "each rank adds its rows).",
    inputs=(Port("input_ids", "INT64", ("T",)), Port("table", "W", ("V", "H"))),
    outputs=(Port("hidden", "dtype", ("T", "H")),),
    attributes=(Attribute("dtype", int, "element type of the output"),),
    types={"W": ("FLOAT", "BFLOAT16")},
    body=_body,
)
