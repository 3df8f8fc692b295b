"""AttentionMerge: joins the parts of sequences whose keys were split over thread blocks."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import FLOAT, f32, for_each_sequence, i64, integer, rows, size, subgraph
from angelforge.plugins.operator import Attribute, AttributeRef, Operator, Port


def _join(op: OpBuilder, partial: ir.Value, lse: ir.Value, tokens: ir.Value) -> ir.Value:
    """f32 [t, Hq, D] from partial [t·S, Hq, D] and lse [t·S, Hq]; tokens is int64 [1]."""
    heads, width = size(op, partial, 1), size(op, partial, 2)
    weights = op.Softmax(op.Reshape(lse, op.Concat(tokens, [-1], heads, axis=0)), axis=1)  # [t, S, Hq]
    parts = op.Reshape(partial, op.Concat(tokens, [-1], heads, width, axis=0))  # [t, S, Hq, D]
    # A part without visible keys has weight 0; whatever stands in it must not count.
    weighted = op.Mul(parts, op.Unsqueeze(weights, [3]))
    seen = op.Greater(op.Unsqueeze(weights, [3]), 0.0)
    return op.ReduceSum(op.Where(seen, weighted, 0.0), [1], keepdims=0)


def merge(
    op: OpBuilder,
    direct: ir.Value,
    partial: ir.Value,
    lse: ir.Value,
    partial_start: ir.Value,
    query_start: ir.Value,
    kv_length: ir.Value,
    split_length: AttributeRef,
) -> ir.Value:
    """[T, Hq·D] in direct's type."""
    split = integer(op, split_length)
    firsts, starts, lengths = i64(op, partial_start), i64(op, query_start), i64(op, kv_length)
    whole = f32(op, direct)

    def append(op: OpBuilder, here: ir.Value, start: ir.Value, end: ir.Value, done: ir.Value) -> ir.Value:
        first, tokens = op.Gather(firsts, here), op.Sub(end, start)

        def joined(op: OpBuilder) -> ir.Value:
            splits = op.Div(op.Sub(op.Add(op.Gather(lengths, here), split), [1]), split)
            last = op.Add(first, op.Mul(tokens, splits))
            return _join(op, rows(op, partial, first, last), rows(op, lse, first, last), tokens)

        own = op.If(
            op.Squeeze(op.And(op.GreaterOrEqual(first, [0]), op.Greater(tokens, [0])), [0]),
            then_branch=subgraph(op, joined, [], [ir.val(None, FLOAT)], "joined"),
            else_branch=subgraph(op, lambda op: rows(op, whole, start, end), [], [ir.val(None, FLOAT)], "direct"),
        )
        return op.Concat(done, own, axis=0)

    def all_sequences(op: OpBuilder) -> ir.Value:
        done = for_each_sequence(op, starts, rows(op, whole, 0, 0), append)
        return op.Concat(done, rows(op, whole, size(op, done, 0), 2**62), axis=0)

    anything_split = op.GreaterOrEqual(op.ReduceMax(firsts, keepdims=0), 0)
    merged = op.If(
        anything_split,
        then_branch=subgraph(op, all_sequences, [], [ir.val(None, FLOAT)], "split"),
        else_branch=subgraph(op, lambda op: op.Identity(whole), [], [ir.val(None, FLOAT)], "whole"),
    )
    return op.CastLike(op.Reshape(merged, op.Concat(size(op, direct, 0), [-1], axis=0)), direct)


INPUTS = (
    Port("direct", "A", ("T", "Hq", "D")),
    Port("partial", "FLOAT", ("C", "Hq", "D")),
    Port("lse", "FLOAT", ("C", "Hq")),
    Port("partial_start", "INT32", ("B",)),
    Port("query_start", "INT32", ("B1",)),
    Port("kv_length", "INT32", ("B",)),
)
ATTRIBUTES = (Attribute("split_length", int, "keys of one part"),)

ATTENTION_MERGE = Operator(
    name="AttentionMerge",
    doc="Rows of a sequence whose partial_start is negative are copied from direct. Another sequence's token i has its "
    "S = ⌈kv_length / split_length⌉ parts in rows partial_start + i·S …: attended = Σ softmax(lse) · partial over the "
    "parts (Dao et al. 2023, Flash-Decoding), in order, rounded once.",
    inputs=INPUTS,
    outputs=(Port("attended", "A", ("T", "W")),),
    attributes=ATTRIBUTES,
    types={"A": ("FLOAT", "BFLOAT16")},
    derive={"W": lambda d: d["Hq"] * d["D"]},
    body=merge,
)
