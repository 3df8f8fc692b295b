"""MoESort: tokens grouped by expert, stably."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import INT32, i64, integer, size, vector
from angelforge.plugins.operator import Attribute, AttributeRef, Operator, Port


def _body(op: OpBuilder, expert_ids: ir.Value, num_experts: AttributeRef) -> tuple[ir.Value, ir.Value, ir.Value]:
    experts = integer(op, num_experts)
    flat = i64(op, op.Reshape(expert_ids, [-1]))
    bucket = op.Where(op.Less(flat, 0), experts, flat)  # padding behind all experts
    total = size(op, flat, 0)
    # TopK breaks ties by the lower index, which makes this sort stable.
    _, order = op.TopK(bucket, total, axis=0, largest=0, sorted=1, _outputs=2)
    ones = op.Expand(op.Constant(value_int=1), total)
    none = op.Expand(op.Constant(value_int=0), vector(op, op.Add(experts, 1)))
    count = op.ScatterElements(none, bucket, ones, axis=0, reduction="add")
    places = op.Range(0, op.Squeeze(total, [0]), 1)
    position = op.ScatterElements(places, order, places, axis=0)
    offsets = op.CumSum(count, 0, exclusive=1)
    return op.Cast(offsets, to=INT32), op.Cast(order, to=INT32), op.Cast(position, to=INT32)


MOE_SORT = Operator(
    name="MoESort",
    doc="order[r] is the entry t·k + j of expert_ids that stands r-th when entries are sorted stably by expert; "
    "position is its inverse; expert e owns rows expert_offsets[e] to expert_offsets[e+1]. Entries of −1 come last "
    "and belong to no expert.",
    inputs=(Port("expert_ids", "INT32", ("T", "k")),),
    outputs=(
        Port("expert_offsets", "INT32", ("E1",)),
        Port("order", "INT32", ("N",)),
        Port("position", "INT32", ("N",)),
    ),
    attributes=(Attribute("num_experts", int, "routed and shared"),),
    derive={"N": lambda d: d["T"] * d["k"], "E1": lambda d: d["num_experts"] + 1},
    body=_body,
)
