"""Heads of a packed qkv row on their way to attention: RMSNorm, RoPE, and the write into the paged pool.

A program serves some heads of one token: a block [heads, pieces, R], where R is half of the rotated dims: pieces 0 and
1 are rotated against each other (pairs i, i + R), the others pass through. f32 throughout, rounded once.
"""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import triton
import triton.language as tl

from angelforge.plugins.device.launch import ceil_div
from angelforge.plugins.kernel import Gpu, Tile


@triton.jit
def dims_of(pieces: tl.constexpr, half: tl.constexpr):
    """int32 [1, pieces, half]: the dim of each place of a head, and that of the place it is rotated against."""
    piece = tl.arange(0, pieces)[None, :, None]
    other = tl.where(piece == 0, 1, tl.where(piece == 1, 0, piece))
    place = tl.arange(0, half)[None, None, :]
    return piece * half + place, other * half + place


@triton.jit
def load_heads(qkv, first, heads: tl.constexpr, head_dim: tl.constexpr, block: tl.constexpr, half: tl.constexpr):
    """(own, against) f32 [block, pieces, half]: heads first … of the token, and what each dim is rotated with."""
    width: tl.constexpr = heads * head_dim
    dim, other = dims_of(head_dim // half, half)
    head = first + tl.arange(0, block)[:, None, None]
    row = qkv + tl.program_id(0).to(tl.int64) * width + head * head_dim
    own = tl.load(row + dim, mask=head < heads, other=0.0).to(tl.float32)
    return own, tl.load(row + other, mask=head < heads, other=0.0).to(tl.float32)


@triton.jit
def inverse_rms(x, head_dim: tl.constexpr, epsilon: tl.constexpr):
    """f32 [block, 1, 1]: 1 / √(mean(x²) + ε) of each head."""
    mean = tl.div_rn(tl.sum(tl.sum(x * x, 2), 1), float(head_dim))
    return tl.div_rn(1.0, tl.sqrt_rn(mean + epsilon))[:, None, None]


@triton.jit
def rotated(own, against, cos, sin, positions, table_rows, pieces: tl.constexpr, half: tl.constexpr):
    """own with pieces 0 and 1 rotated by the token's position, which is clamped to the tables."""
    position = tl.minimum(tl.maximum(tl.load(positions + tl.program_id(0)), 0), table_rows - 1).to(tl.int64)
    place = tl.arange(0, half)
    c = tl.load(cos + position * half + place)[None, None, :]
    s = tl.load(sin + position * half + place)[None, None, :]
    piece = tl.arange(0, pieces)[None, :, None]
    turned = own * c + against * tl.where(piece == 0, -s, s)
    return tl.where(piece < 2, turned, own)


@triton.jit
def store_heads(
    x,
    first,
    query,
    kv_cache,
    slots,
    num_tokens,
    pages,
    q_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    page_size: tl.constexpr,
    block: tl.constexpr,
    half: tl.constexpr,
):
    """Q heads to `query`, K and V heads to the token's slot of the pool, which is clamped to it.

    Rows of padding belong to slot 0, in which the last one is left: only that one is written.
    """
    token = tl.program_id(0).to(tl.int64)
    dim, _other = dims_of(head_dim // half, half)
    head = first + tl.arange(0, block)[:, None, None]
    x = x.to(query.dtype.element_ty)
    tl.store(query + (token * q_heads + head) * head_dim + dim, x, mask=head < q_heads)
    valid = token < tl.load(num_tokens)
    slot = tl.where(valid, tl.load(slots + token), 0).to(tl.int64)
    slot = tl.minimum(tl.maximum(slot, 0), tl.cast(pages, tl.int64) * page_size - 1)
    place = head - q_heads  # keys, then values
    row = ((slot // page_size * 2 + place // kv_heads) * kv_heads + place % kv_heads) * page_size + slot % page_size
    inside = (place >= 0) & (place < 2 * kv_heads) & (valid | (token == tl.num_programs(0) - 1))
    tl.store(kv_cache + row * head_dim + dim, x, mask=inside)


def head_constants(dims: Mapping[str, Any], types: Mapping[str, ir.DataType], tile: Tile) -> dict[str, Any]:
    """The constants that both kernels share.

    Raises:
        ValueError: a head cannot be cut into a power of two of pieces of half the rotated dims.
    """
    half, head_dim = dims["rotary_dim"] // 2, dims["D"]
    if half < 1 or head_dim % half or any(size & (size - 1) for size in (half, head_dim)):
        raise ValueError(f"rotary_dim {dims['rotary_dim']} and head_dim {head_dim} must be powers of two")
    return {
        "q_heads": dims["num_heads"],
        "kv_heads": dims["num_kv_heads"],
        "head_dim": head_dim,
        "half": half,
        "page_size": dims["page_size"],
        "block": tile.n,
    }


def head_grid(dims: Mapping[str, Any], gpu: Gpu, tile: Tile) -> tuple[Any, Any, Any]:
    """A program for each token and `tile.n` heads."""
    return dims["T"], ceil_div(dims["num_heads"] + 2 * dims["num_kv_heads"], tile.n), 1


def head_tile(dims: Mapping[str, Any], tokens: int) -> Tile:
    """16 bytes of bf16 a thread: two heads of 128 a warp; few warps where few tokens should spread over the GPU."""
    return Tile(m=1, n=2, warps=1, stages=1) if tokens <= 256 else Tile(m=1, n=8, warps=4, stages=1)
