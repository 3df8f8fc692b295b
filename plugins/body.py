"""Small pieces that function bodies share. Everything here builds standard ONNX nodes."""

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.operator import AttributeRef

FLOAT = ir.DataType.FLOAT
INT32 = ir.DataType.INT32
INT64 = ir.DataType.INT64


def f32(op: OpBuilder, value: ir.Value) -> ir.Value:
    """`value` widened to f32; disappears where it is f32 already."""
    return op.Cast(value, to=FLOAT)


def i64(op: OpBuilder, value: ir.Value) -> ir.Value:
    """`value` as int64, the type of ONNX indices."""
    return op.Cast(value, to=INT64)


def integer(op: OpBuilder, attribute: AttributeRef) -> ir.Value:
    """The function's integer attribute as a scalar int64 value."""
    return op.Constant(value_int=attribute.as_("value_int"))


def vector(op: OpBuilder, *sizes: Any) -> ir.Value:
    """int64 [n] of scalars, one-element vectors and Python integers, for Reshape and Expand."""
    return op.Concat(*(op.Reshape(size, [1]) if isinstance(size, ir.Value) else [size] for size in sizes), axis=0)


def size(op: OpBuilder, value: ir.Value, axis: int) -> ir.Value:
    """int64 [1]: the size of one axis."""
    return op.Shape(value, start=axis, end=axis + 1)


def rows(op: OpBuilder, value: ir.Value, start: Any, end: Any, axis: int = 0) -> ir.Value:
    """`value[start:end]` along `axis`; bounds are [1] vectors or Python integers."""
    bounds = (bound if isinstance(bound, ir.Value) else [bound] for bound in (start, end))
    return op.Slice(value, *bounds, [axis])


def linear(op: OpBuilder, x: ir.Value, weight: ir.Value) -> ir.Value:
    """x [T, K] · weight [N, K]ᵀ in f32."""
    return op.Gemm(f32(op, x), f32(op, weight), transB=1)


def swiglu(op: OpBuilder, gate: ir.Value, up: ir.Value) -> ir.Value:
    """silu(gate) · up (Shazeer 2020, arXiv 2002.05202)."""
    return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)


def valid_rows(op: OpBuilder, like: ir.Value, num_tokens: ir.Value) -> ir.Value:
    """bool [T]: rows of `like` [T, …] before `num_tokens` int32 [1]; the rest is padding."""
    return op.Less(op.Range(0, op.Squeeze(size(op, like, 0), [0]), 1), i64(op, num_tokens))


def subgraph(
    op: OpBuilder, trace: Callable[..., Any], inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], name: str
) -> ir.Graph:
    """A body for Scan, Loop or If. Value names are prefixed, since ONNX wants them unique across nesting."""

    def scoped(inner: OpBuilder, *values: ir.Value) -> Any:
        inner.builder.push_module(name)
        try:
            return trace(inner, *values)
        finally:
            inner.builder.pop_module()

    return op.builder.subgraph(scoped, inputs, outputs, name=name)


def for_each_sequence(
    op: OpBuilder, query_start: ir.Value, nothing: ir.Value, append: Callable[..., ir.Value]
) -> ir.Value:
    """Rows of all sequences, one after another: `append(op, index, start, end, done)` adds those of one to `done`.

    `query_start` int64 [B+1] are the row ranges, `nothing` the result before the first sequence (0 rows); index, start
    and end are int64 [1]. Memory is one sequence's beside the result.
    """

    def one_sequence(op: OpBuilder, index: ir.Value, go_on: ir.Value, done: ir.Value) -> tuple[ir.Value, ir.Value]:
        here = op.Unsqueeze(index, [0])
        start, end = op.Gather(query_start, here), op.Gather(query_start, op.Add(here, [1]))
        return op.Identity(go_on), append(op, here, start, end, done)

    rank = [None] * 3
    body = subgraph(
        op,
        one_sequence,
        [ir.val("index", INT64, []), ir.val("go_on", ir.DataType.BOOL, []), ir.val("done", FLOAT, rank)],
        [ir.val(None, ir.DataType.BOOL, []), ir.val(None, FLOAT)],
        "sequence",
    )
    count = op.Sub(op.Squeeze(size(op, query_start, 0), [0]), 1)
    return op.Loop(count, True, nothing, body=body)


def _f32() -> ir.Value:
    return ir.val(None, FLOAT)
