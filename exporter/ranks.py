"""What a graph for several ranks has beside one rank's part of the model: its place in the vocabulary.

Ids and logits are the only things in which ranks differ; both follow from the input `rank`, so that all ranks run one
graph. Logits are put together by a sum of rows that are 0 outside a rank's own part: TensorRT's collective sums, and
twice the bytes of a gather are still little beside a step (docs/ranks.md).
"""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.all_reduce.operator import ALL_REDUCE
from angelforge.plugins.operator import call

INT64 = ir.DataType.INT64
FLOAT = ir.DataType.FLOAT


def ids_of_rank(op: OpBuilder, input_ids: ir.Value, rank: ir.Value, rows: int) -> ir.Value:
    """int64 [T]: ids counted from the first of a rank's `rows` ids; those of other ranks are outside its table."""
    first = _typed(op.Mul(rank, _integers(op, rows)), INT64, 1)
    return _typed(op.Sub(input_ids, first), INT64, "T")


def logits_of_all(op: OpBuilder, logits: ir.Value, rank: ir.Value, ranks: int, width: int) -> ir.Value:
    """f32 [R, vocab] on every rank, from each rank's own f32 [R, width], width = vocab / ranks."""
    every = _typed(_integers(op, *range(ranks)), INT64, ranks)
    own = op.Unsqueeze(_typed(op.Equal(every, rank), ir.DataType.BOOL, ranks), _integers(op, 0, 2))  # [1, ranks, 1]
    zero = op.Constant(value=ir.tensor([0.0], dtype=FLOAT))
    placed = _typed(op.Where(own, op.Unsqueeze(logits, _integers(op, 1)), zero), FLOAT, "R", ranks, width)
    flat = _typed(op.Reshape(placed, _integers(op, 0, ranks * width)), FLOAT, "R", ranks * width)
    return call(op, ALL_REDUCE, flat)


def _integers(op: OpBuilder, *values: int) -> ir.Value:
    """A constant int64 [n] as a node: an initializer would be a weight."""
    return _typed(op.Constant(value_ints=list(values)), INT64, len(values))


def _typed(value: ir.Value, dtype: ir.DataType, *shape: int | str) -> ir.Value:
    """`value`, with the type and shape by which builders check what follows it."""
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
    return value
