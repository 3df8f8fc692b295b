"""AttentionMerge's kernel: a program joins the parts of some heads of one token, or copies them."""

import triton
import triton.language as tl

from angelforge.plugins.attention_merge.operator import ATTENTION_MERGE
from angelforge.plugins.device.merge import merge_constants, merge_grid, merge_tile, merged_heads
from angelforge.plugins.kernel import Kernel


@triton.jit(do_not_specialize=["batch", "capacity"])
def _attention_merge(
    direct,
    partial,
    lse,
    partial_start,
    query_start,
    kv_length,
    batch,
    capacity,
    attended,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    split_length: tl.constexpr,
    block: tl.constexpr,
    ahead: tl.constexpr,
    chunk: tl.constexpr,
):
    first = tl.program_id(1) * block
    joined = merged_heads(
        direct, partial, lse, partial_start, query_start, kv_length, batch, capacity, first,
        heads, head_dim, split_length, block, ahead, chunk,
    )  # fmt: skip
    head = first + tl.arange(0, block)[:, None]
    place = (tl.program_id(0).to(tl.int64) * heads + head) * head_dim + tl.arange(0, head_dim)[None, :]
    tl.store(attended + place, joined.to(attended.dtype.element_ty), mask=head < heads)


KERNEL = Kernel(
    operator=ATTENTION_MERGE,
    function=_attention_merge,
    extras=("B", "C"),
    constants=merge_constants,
    grid=merge_grid,
    tile=merge_tile,
)
