"""QKVPrepare's kernel: a program normalises, rotates and stores some heads of one token."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import triton
import triton.language as tl

from angelforge.plugins.device.heads import (
    dims_of,
    head_constants,
    head_grid,
    head_tile,
    inverse_rms,
    load_heads,
    rotated,
    store_heads,
)
from angelforge.plugins.kernel import Kernel, Tile
from angelforge.plugins.qkv_prepare.operator import QKV_PREPARE


@triton.jit
def _weight(q_norm, k_norm, head, dim, q_heads: tl.constexpr, kv_heads: tl.constexpr):
    """f32: what each dim of a head is multiplied with after the norm."""
    q = tl.load(q_norm + dim).to(tl.float32)
    return tl.where(head < q_heads, q, tl.load(k_norm + dim).to(tl.float32))


@triton.jit(do_not_specialize=["table_rows", "pages"])
def _qkv_prepare(
    qkv,
    q_norm,
    k_norm,
    rope_cos,
    rope_sin,
    positions,
    slots,
    num_tokens,
    kv_cache,
    table_rows,
    pages,
    query,
    kv_cache_out,
    q_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    half: tl.constexpr,
    page_size: tl.constexpr,
    block: tl.constexpr,
    epsilon: tl.constexpr,
):
    first = tl.program_id(1) * block
    pieces: tl.constexpr = head_dim // half
    own, against = load_heads(qkv, first, q_heads + 2 * kv_heads, head_dim, block, half)
    head = first + tl.arange(0, block)[:, None, None]
    dim, other = dims_of(pieces, half)
    scale = inverse_rms(own, head_dim, epsilon)
    x = own * scale * _weight(q_norm, k_norm, head, dim, q_heads, kv_heads)
    y = against * scale * _weight(q_norm, k_norm, head, other, q_heads, kv_heads)
    x = rotated(x, y, rope_cos, rope_sin, positions, table_rows, pieces, half)
    x = tl.where(head < q_heads + kv_heads, x, own)
    store_heads(
        x, first, query, kv_cache_out, slots, num_tokens, pages, q_heads, kv_heads, head_dim, page_size, block, half
    )


def _constants(dims: Mapping[str, Any], types: Mapping[str, ir.DataType], tile: Tile) -> dict[str, Any]:
    return {**head_constants(dims, types, tile), "epsilon": dims["epsilon"]}


KERNEL = Kernel(
    operator=QKV_PREPARE,
    function=_qkv_prepare,
    extras=("P", "pages"),
    constants=_constants,
    grid=head_grid,
    tile=head_tile,
)
