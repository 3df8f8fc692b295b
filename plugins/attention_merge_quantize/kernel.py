"""AttentionMergeQuantize's kernel: AttentionMerge's, and the FP8 form of each 128 channels."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import triton
import triton.language as tl

from angelforge.plugins.attention_merge_quantize.operator import ATTENTION_MERGE_QUANTIZE
from angelforge.plugins.device.merge import merge_constants, merge_grid, merge_tile, merged_heads
from angelforge.plugins.device.numbers import group_scale, quantize
from angelforge.plugins.kernel import Kernel, Tile


@triton.jit(do_not_specialize=["batch", "capacity"])
def _attention_merge_quantize(
    direct,
    partial,
    lse,
    partial_start,
    query_start,
    kv_length,
    batch,
    capacity,
    quantized,
    scale,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    split_length: tl.constexpr,
    block: tl.constexpr,
    ahead: tl.constexpr,
    chunk: tl.constexpr,
):
    joined = merged_heads(
        direct, partial, lse, partial_start, query_start, kv_length, batch, capacity, tl.program_id(1) * block,
        heads, head_dim, split_length, block, ahead, chunk,
    )  # fmt: skip
    width: tl.constexpr = heads * head_dim
    groups: tl.constexpr = (width + 127) // 128
    own: tl.constexpr = block * head_dim // 128  # groups of this program
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * own + tl.arange(0, own)
    joined = tl.reshape(joined, (own, 128))
    divisor = group_scale(tl.max(tl.abs(joined), 1))  # [own]
    tl.store(scale + token * groups + group, divisor, mask=group < groups)
    channel = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    tl.store(quantized + token * width + channel, quantize(joined, divisor[:, None]), mask=channel < width)


def _constants(dims: Mapping[str, Any], types: Mapping[str, ir.DataType], tile: Tile) -> dict[str, Any]:
    if tile.n % 128:
        raise ValueError(f"a program quantises whole groups of 128 channels, not {tile.n}")
    return merge_constants(dims, types, tile)


KERNEL = Kernel(
    operator=ATTENTION_MERGE_QUANTIZE,
    function=_attention_merge_quantize,
    extras=("B", "C"),
    constants=_constants,
    grid=merge_grid,
    tile=merge_tile,
)
