"""QKVPrepare: per-head RMSNorm of Q and K, RoPE, and the write of K and V into the paged pool."""

from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import f32, i64, integer, rows, size, valid_rows, vector
from angelforge.plugins.norm.operator import rms_norm
from angelforge.plugins.operator import Attribute, AttributeRef, Operator, Port


def _rotate(
    op: OpBuilder,
    x: ir.Value,
    positions: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
    heads: AttributeRef,
    rotary_dim: AttributeRef,
) -> ir.Value:
    """x [T, heads, D] with NeoX rotary embedding on the first `rotary_dim` dims (Su et al. 2021, arXiv 2104.09864)."""
    packed = op.Unsqueeze(op.Flatten(x, axis=1), [0])  # [1, T, heads·D]
    turned = op.RotaryEmbedding(
        packed,
        cos,
        sin,
        positions,
        num_heads=heads.as_("num_heads"),
        rotary_embedding_dim=rotary_dim.as_("rotary_embedding_dim"),
    )
    return op.Reshape(turned, op.Shape(x))


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


def _body(
    op: OpBuilder,
    qkv: ir.Value,
    q_norm: ir.Value,
    k_norm: ir.Value,
    rope_cos: ir.Value,
    rope_sin: ir.Value,
    positions: ir.Value,
    slots: ir.Value,
    num_tokens: ir.Value,
    kv_cache: ir.Value,
    **attributes: Any,
) -> tuple[ir.Value, ir.Value]:
    heads, kv_heads, epsilon, rotary_dim = (
        attributes[name] for name in ("num_heads", "num_kv_heads", "epsilon", "rotary_dim")
    )
    q_heads, pairs = integer(op, heads), integer(op, kv_heads)
    split = op.Reshape(f32(op, qkv), vector(op, 0, op.Add(q_heads, op.Add(pairs, pairs)), -1))  # [T, Hq + 2·Hkv, D]
    first_key, first_value = op.Reshape(q_heads, [1]), op.Reshape(op.Add(q_heads, pairs), [1])
    query = rms_norm(op, rows(op, split, 0, first_key, axis=1), q_norm, epsilon)
    key = rms_norm(op, rows(op, split, first_key, first_value, axis=1), k_norm, epsilon)
    value = rows(op, split, first_value, 2**62, axis=1)
    where = op.Unsqueeze(i64(op, positions), [0])
    query = _rotate(op, query, where, rope_cos, rope_sin, heads, rotary_dim)
    key = _rotate(op, key, where, rope_cos, rope_sin, kv_heads, rotary_dim)
    written = op.CastLike(op.Concat(op.Unsqueeze(key, [1]), op.Unsqueeze(value, [1]), axis=1), kv_cache)
    targets = op.Where(valid_rows(op, slots, num_tokens), i64(op, slots), [0])
    pool = op.ScatterND(kv_cache, _pool_indices(op, targets, kv_cache), written)
    return op.CastLike(query, qkv), pool


QKV_PREPARE = Operator(
    name="QKVPrepare",
    doc="Splits qkv into heads, normalises Q and K per head, rotates the first rotary_dim dims (pairs i, i + "
    "rotary_dim/2), and writes K and V of token t to slots[t] of the pool; f32 inside, rounded once. Padding rows "
    "(from num_tokens on) are written to page 0.",
    inputs=(
        Port("qkv", "A", ("T", "W"), "rows: all Q heads, all K heads, all V heads"),
        Port("q_norm", "W", ("D",)),
        Port("k_norm", "W", ("D",)),
        Port("rope_cos", "FLOAT", ("P", "R2")),
        Port("rope_sin", "FLOAT", ("P", "R2")),
        Port("positions", "INT32", ("T",)),
        Port("slots", "INT32", ("T",), "page · page_size + offset"),
        Port("num_tokens", "INT32", (1,)),
        Port("kv_cache", "A", ("pages", 2, "Hkv", "page_size", "D")),
    ),
    outputs=(
        Port("query", "A", ("T", "num_heads", "D")),
        Port("kv_cache_out", "A", ("pages", 2, "Hkv", "page_size", "D")),
    ),
    attributes=(
        Attribute("num_heads", int),
        Attribute("num_kv_heads", int),
        Attribute("rotary_dim", int),
        Attribute("epsilon", float, "of the per-head RMSNorm"),
    ),
    types={"A": ("FLOAT", "BFLOAT16"), "W": ("FLOAT", "BFLOAT16")},
    aliases={"kv_cache_out": "kv_cache"},
    body=_body,
)
