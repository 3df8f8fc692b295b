"""Mixture of experts in standard ONNX nodes: one expert after another, so that memory is that of one."""

from collections.abc import Callable, Sequence
from itertools import count

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import FLOAT, INT64, i64, rows, size, subgraph


def token_of_entry(op: OpBuilder, entries: ir.Value, expert_ids: ir.Value) -> ir.Value:
    """The tokens int64 that own entries int64 of the flattened `expert_ids` [T, k]."""
    return op.Div(entries, size(op, expert_ids, 1))


def for_each_expert(
    op: OpBuilder, expert_ids: ir.Value, weights: Sequence[ir.Value], width: ir.Value, compute: Callable[..., ir.Value]
) -> ir.Value:
    """f32 [T, k, width]: `compute(op, entries, *weights of one expert)` for the entries of each expert, in place.

    An entry is an index int64 into the flattened `expert_ids` int32 [T, k]; `weights` have the experts on axis 0;
    `width` is int64 [1]. Scans over the experts; one without entries is not read. Entries that name no expert give 0.
    """
    order, starts, ends = _sorted_by_expert(op, expert_ids, size(op, weights[0], 0))
    shape = op.Concat(size(op, order, 0), width, axis=0)
    empty = op.ConstantOfShape(shape, value=ir.tensor([0.0], dtype=FLOAT))
    no_entries = op.ConstantOfShape([0, 1], value=ir.tensor([0], dtype=INT64))
    no_rows = rows(op, empty, 0, 0)

    def one_expert(
        op: OpBuilder, state: ir.Value, used: ir.Value, start: ir.Value, end: ir.Value, *expert: ir.Value
    ) -> ir.Value:
        def of_entries(op: OpBuilder) -> tuple[ir.Value, ir.Value]:
            entries = rows(op, order, op.Unsqueeze(start, [0]), op.Unsqueeze(end, [0]))
            return op.Unsqueeze(entries, [1]), compute(op, entries, *expert)

        # Most experts are idle in a decode step: what they cost is the time of the step.
        idle = subgraph(op, lambda op: (op.Identity(no_entries), op.Identity(no_rows)), [], _found(), "idle")
        busy = subgraph(op, of_entries, [], _found(), "busy")
        places, result = op.If(used, then_branch=busy, else_branch=idle, _outputs=2)
        return op.ScatterND(state, places, result)

    names = count()
    body = subgraph(
        op,
        one_expert,
        [
            ir.val("state", FLOAT, [None, None]),
            ir.val("used", ir.DataType.BOOL, []),
            ir.val("start", INT64, []),
            ir.val("end", INT64, []),
            *(ir.val(f"weight_{next(names)}") for _ in weights),
        ],
        [ir.val(None, FLOAT, [None, None])],
        "expert",
    )
    result = op.Scan(empty, op.Less(starts, ends), starts, ends, *weights, body=body, num_scan_inputs=3 + len(weights))
    return op.Reshape(result, op.Concat(op.Shape(expert_ids), width, axis=0))


def _sorted_by_expert(op: OpBuilder, expert_ids: ir.Value, experts: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """All int64: entries [T·k] in stable order of expert, and each expert's range in that order: starts, ends [E]."""
    flat = i64(op, op.Reshape(expert_ids, [-1]))
    exists = op.And(op.GreaterOrEqual(flat, 0), op.Less(flat, experts))
    bucket = op.Where(exists, flat, experts)  # no expert: behind all
    total = size(op, flat, 0)
    # TopK breaks ties by the lower index, which makes this sort stable.
    _, order = op.TopK(bucket, total, axis=0, largest=0, sorted=1, _outputs=2)
    none = op.ConstantOfShape(op.Add(experts, [1]), value=ir.tensor([0], dtype=INT64))
    hits = op.Expand(op.Constant(value_int=1), total)
    counts = op.ScatterElements(none, bucket, hits, axis=0, reduction="add")
    ends = op.CumSum(counts, 0)
    return order, rows(op, op.Sub(ends, counts), 0, -1), rows(op, ends, 0, -1)


def _found() -> list[ir.Value]:
    return [ir.val(None, INT64), ir.val(None, FLOAT)]
