"""The parts of a sequence's keys joined: what AttentionMerge and AttentionMergeQuantize share.

A program serves some heads of one token, a block [heads, head_dim]. Parts are joined one after the other, as
PagedAttention joins them in registers (`device.attention`), while the next ones are on their way from memory.
"""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import triton
import triton.language as tl

from angelforge.plugins.device.attention import LOWEST, inverse, shares
from angelforge.plugins.device.launch import ceil_div
from angelforge.plugins.kernel import Gpu, Tile


@triton.jit
def _sequence_of(query_start, token, batch, chunk: tl.constexpr):
    """(sequence that owns row `token`, its first row); −1 before all of them, `batch` after them.

    Of starts that do not rise it makes what `device.sequences` makes of them.
    """
    found, begin = batch + 1, 0
    for first in range(0, batch + 1, chunk):
        index = first + tl.arange(0, chunk)
        start = tl.load(query_start + index, mask=index <= batch, other=0)
        found = tl.minimum(found, tl.min(tl.where((index <= batch) & (start > token), index, batch + 1)))
        begin = tl.maximum(begin, tl.max(tl.where(index < found, start, 0)))
    return found - 1, begin


@triton.jit
def _parts_of(
    query_start, kv_length, partial_start, token, batch, capacity, split_length: tl.constexpr, chunk: tl.constexpr
):
    """(row of the token's first part, int64; how many parts, −1 if the token stands in `direct`)."""
    sequence, begin = _sequence_of(query_start, token, batch, chunk)
    inside = (sequence >= 0) & (sequence < batch)
    first = tl.load(partial_start + sequence, mask=inside, other=-1)
    length = tl.maximum(tl.load(kv_length + sequence, mask=inside, other=0), 0)
    parts = length // split_length + (length % split_length > 0).to(tl.int32)
    row = first + (token - begin).to(tl.int64) * parts
    return row, tl.where(first < 0, -1, tl.minimum(tl.maximum(capacity - row, 0), parts).to(tl.int32))


@triton.jit
def _load_part(partial, lse, row, part, parts, head, dim, heads: tl.constexpr):
    """(f32 [block, head_dim], lse [block, 1]) of one part; from `parts` on 0 and −inf."""
    place = (row + part) * heads + head
    mask = (part < parts) & (head < heads)
    result = tl.load(partial + place * dim.shape[1] + dim, mask=mask, other=0.0)
    return result, tl.load(lse + place, mask=mask, other=float("-inf"))


@triton.jit
def _load_parts(partial, lse, row, part, parts, head, dim, heads: tl.constexpr, ahead: tl.constexpr):
    """`ahead` parts from `part` on, one after the other."""
    loaded = _load_part(partial, lse, row, part, parts, head, dim, heads)
    for step in tl.static_range(1, ahead):
        loaded = loaded + _load_part(partial, lse, row, part + step, parts, head, dim, heads)
    return loaded


@triton.jit
def merged_heads(
    direct,
    partial,
    lse,
    partial_start,
    query_start,
    kv_length,
    batch,
    capacity,
    first,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    split_length: tl.constexpr,
    block: tl.constexpr,
    ahead: tl.constexpr,
    chunk: tl.constexpr,
):
    """f32 [block, head_dim]: heads first … of the program's token, rounded to the type of `direct`."""
    token = tl.program_id(0)
    head = first + tl.arange(0, block)[:, None]
    dim = tl.arange(0, head_dim)[None, :]
    row, parts = _parts_of(query_start, kv_length, partial_start, token, batch, capacity, split_length, chunk)
    if parts < 0:
        place = (token.to(tl.int64) * heads + head) * head_dim + dim
        joined = tl.load(direct + place, mask=head < heads, other=0.0).to(tl.float32)
    else:
        joined = tl.zeros([block, head_dim], tl.float32)
        weight = tl.zeros([block, 1], tl.float32)
        top = tl.full([block, 1], LOWEST, tl.float32)
        loaded = _load_parts(partial, lse, row, 0, parts, head, dim, heads, ahead)
        for part in range(0, parts, ahead):
            following = _load_parts(partial, lse, row, part + ahead, parts, head, dim, heads, ahead)
            for step in tl.static_range(ahead):
                top, fade, share = shares(loaded[2 * step + 1], top)
                # What stands in a part without visible keys must not count: it may be NaN.
                result = tl.where(share > 0, loaded[2 * step], 0.0)
                joined = tl.fma(result, share, joined * fade)
                weight = tl.fma(weight, fade, share)
            loaded = following
        joined = (joined * inverse(weight)).to(direct.dtype.element_ty).to(tl.float32)
    return joined


def merge_constants(dims: Mapping[str, Any], types: Mapping[str, ir.DataType], tile: Tile) -> dict[str, Any]:
    """The constants that both kernels share.

    Raises:
        ValueError: head_dim is not a power of two.
    """
    if dims["D"] & (dims["D"] - 1):
        raise ValueError(f"head_dim {dims['D']} must be a power of two")
    return {
        "heads": dims["Hq"],
        "head_dim": dims["D"],
        "split_length": dims["split_length"],
        "block": max(1, tile.n // dims["D"]),
        "ahead": tile.stages,
        "chunk": tile.k,
    }


def merge_grid(dims: Mapping[str, Any], gpu: Gpu, tile: Tile) -> tuple[Any, Any, Any]:
    """A program for each token and block of heads."""
    return dims["T"], ceil_div(dims["Hq"], max(1, tile.n // dims["D"])), 1


def merge_tile(dims: Mapping[str, Any], tokens: int) -> Tile:
    """n: channels, k: sequences that are looked through at once, stages: parts that are loaded at once.

    A sequence of 128K keys has 512 parts: with few tokens, 32 heads must keep the L2 cache busy alone, by a thread for
    each channel and many loads at once. Most rows of a prompt stand in `direct` and are copied.
    """
    if tokens <= 64:
        return Tile(m=1, n=128, k=256, warps=4, stages=32 if tokens <= 8 else 16)
    return Tile(m=1, n=512, k=256, warps=4, stages=8) if tokens <= 256 else Tile(m=1, n=1024, k=256, warps=4, stages=4)
