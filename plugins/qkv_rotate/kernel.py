"""QKVRotate's kernel: a program rotates and stores some heads of one token."""

import triton
import triton.language as tl

from angelforge.plugins.device.heads import head_constants, head_grid, head_tile, load_heads, rotated, store_heads
from angelforge.plugins.kernel import Kernel
from angelforge.plugins.qkv_rotate.operator import QKV_ROTATE


@triton.jit(do_not_specialize=["table_rows", "pages"])
def _qkv_rotate(
    qkv,
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
):
    first = tl.program_id(1) * block
    own, against = load_heads(qkv, first, q_heads + 2 * kv_heads, head_dim, block, half)
    x = rotated(own, against, rope_cos, rope_sin, positions, table_rows, head_dim // half, half)
    x = tl.where(first + tl.arange(0, block)[:, None, None] < q_heads + kv_heads, x, own)
    store_heads(
        x, first, query, kv_cache_out, slots, num_tokens, pages, q_heads, kv_heads, head_dim, page_size, block, half
    )


KERNEL = Kernel(
    operator=QKV_ROTATE,
    function=_qkv_rotate,
    extras=("P", "pages"),
    constants=head_constants,
    grid=head_grid,
    tile=head_tile,
)
