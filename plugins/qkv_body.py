"""What the bodies of QKVPrepare and QKVRotate share: the split into heads, RoPE, and the write into the paged pool."""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import f32, i64, integer, rows, size, valid_rows, vector
from angelforge.plugins.operator import AttributeRef


def split_heads(
    op: OpBuilder, qkv: ir.Value, num_heads: AttributeRef, num_kv_heads: AttributeRef
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """qkv [T, (Hq + 2·Hkv)·D] → query [T, Hq, D], key and value [T, Hkv, D], f32."""
    queries, pairs = integer(op, num_heads), integer(op, num_kv_heads)
    split = op.Reshape(f32(op, qkv), vector(op, 0, op.Add(queries, op.Add(pairs, pairs)), -1))  # [T, Hq + 2·Hkv, D]
    first_key, first_value = op.Reshape(queries, [1]), op.Reshape(op.Add(queries, pairs), [1])
    query = rows(op, split, 0, first_key, axis=1)
    key = rows(op, split, first_key, first_value, axis=1)
    return query, key, rows(op, split, first_value, 2**62, axis=1)


def rotate(
    op: OpBuilder,
    x: ir.Value,
    positions: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
    heads: AttributeRef,
    rotary_dim: AttributeRef,
) -> ir.Value:
    """x [T, heads, D] with NeoX rotary embedding on the first `rotary_dim` dims (Su et al. 2021, arXiv 2104.09864)."""
    # T sequences of one token each: ONNX Runtime refuses a sequence that is longer than the tables.
    packed = op.Unsqueeze(op.Flatten(x, axis=1), [1])  # [T, 1, heads·D]
    turned = op.RotaryEmbedding(
        packed,
        cos,
        sin,
        op.Unsqueeze(i64(op, positions), [1]),
        num_heads=heads.as_("num_heads"),
        rotary_embedding_dim=rotary_dim.as_("rotary_embedding_dim"),
    )
    return op.Reshape(turned, op.Shape(x))


def write_pool(
    op: OpBuilder, key: ir.Value, value: ir.Value, slots: ir.Value, num_tokens: ir.Value, kv_cache: ir.Value
) -> ir.Value:
    """`kv_cache` with key and value [T, Hkv, D] at `slots`; rows of padding go to page 0."""
    written = op.CastLike(op.Concat(op.Unsqueeze(key, [1]), op.Unsqueeze(value, [1]), axis=1), kv_cache)
    targets = op.Where(valid_rows(op, slots, num_tokens), i64(op, slots), [0])
    return op.ScatterND(kv_cache, _pool_indices(op, targets, kv_cache), written)


def _pool_indices(op: OpBuilder, slots: ir.Value, pool: ir.Value) -> ir.Value:
    """int64 [T, 2, kv_heads, 4]: (page, key or value, head, offset) of every row that `slots` int64 [T] names."""
    page_size = size(op, pool, 3)
    heads = size(op, pool, 2)
    full = op.Concat(size(op, slots, 0), [2], heads, [1], axis=0)
    page = op.Reshape(op.Div(slots, page_size), [-1, 1, 1, 1])
    offset = op.Reshape(op.Mod(slots, page_size), [-1, 1, 1, 1])
    kind = op.Constant(value=ir.tensor([[[[0]], [[1]]]], dtype=ir.DataType.INT64))  # [1, 2, 1, 1]
    head = op.Reshape(op.Range(0, op.Squeeze(heads, [0]), 1), [1, 1, -1, 1])
    return op.Concat(*(op.Expand(index, full) for index in (page, kind, head, offset)), axis=3)
