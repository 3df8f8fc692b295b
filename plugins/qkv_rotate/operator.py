"""QKVRotate: RoPE of Q and K and the write of K and V into the pool, for models without QK-norm (EAGLE3 drafts)."""

from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.operator import Attribute, Operator, Port
from angelforge.plugins.qkv_body import rotate, split_heads, write_pool


def _body(
    op: OpBuilder,
    qkv: ir.Value,
    rope_cos: ir.Value,
    rope_sin: ir.Value,
    positions: ir.Value,
    slots: ir.Value,
    num_tokens: ir.Value,
    kv_cache: ir.Value,
    **attributes: Any,
) -> tuple[ir.Value, ir.Value]:
    heads, kv_heads, rotary_dim = (attributes[name] for name in ("num_heads", "num_kv_heads", "rotary_dim"))
    query, key, value = split_heads(op, qkv, heads, kv_heads)
    query = rotate(op, query, positions, rope_cos, rope_sin, heads, rotary_dim)
    key = rotate(op, key, positions, rope_cos, rope_sin, kv_heads, rotary_dim)
    return op.CastLike(query, qkv), write_pool(op, key, value, slots, num_tokens, kv_cache)


QKV_ROTATE = Operator(
    name="QKVRotate",
    doc="QKVPrepare without the norms: splits qkv into heads, rotates the first rotary_dim dims of Q and K (pairs i, "
    "i + rotary_dim/2), and writes K and V of token t to slots[t] of the pool; f32 inside, rounded once. Padding rows "
    "(from num_tokens on) are written to page 0.",
    inputs=(
        Port("qkv", "A", ("T", "W"), "rows: all Q heads, all K heads, all V heads"),
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
    ),
    types={"A": ("FLOAT", "BFLOAT16")},
    aliases={"kv_cache_out": "kv_cache"},
    body=_body,
)
