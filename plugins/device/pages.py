"""Tiles of keys or values of one sequence and head out of a paged pool [pages, 2, kv_heads, page_size, head_dim].

Page numbers are clamped to the pool, so that a wrong page table reads wrong keys and never foreign memory. Offsets are
64-bit: a pool passes 2³¹ elements. A tile is read in pieces that lie in one page each: a thread then needs one address
for all of its keys there.
"""

import triton
import triton.language as tl


@triton.jit
def pages_of(table, key, end, pages, page_size: tl.constexpr, keys: tl.constexpr):
    """int32, scalar or [pieces]: the pages of keys key … key + keys − 1 (key is a multiple of keys, a power of two).

    `table` points to the sequence's row; what begins at `end` or later is not looked up.
    """
    if page_size % keys == 0:
        page = tl.load(table + key // page_size, mask=key < end, other=0)
    else:
        pieces: tl.constexpr = _pieces(page_size, keys)
        start = key + tl.arange(0, pieces) * (keys // pieces)
        page = tl.load(table + start // page_size, mask=start < end, other=0)
    return tl.minimum(tl.maximum(page, 0), pages - 1)


@triton.jit
def load_tile(
    head,
    page,
    key,
    end,
    page_stride: tl.constexpr,
    page_size: tl.constexpr,
    head_dim: tl.constexpr,
    keys: tl.constexpr,
):
    """[keys, head_dim]: keys or values key … key + keys − 1; from `end` on 0, since stale memory may hold NaN.

    `head` points to the head in page 0, `page` is of `pages_of`.
    """
    # What is the same for all keys is added first: each thread then has one changing address and fixed distances.
    dim = tl.arange(0, head_dim)
    if page_size % keys == 0:
        place = tl.arange(0, keys)[:, None]
        tile = head + page.to(tl.int64) * page_stride + key % page_size * head_dim
        tile = tile + (place * head_dim + dim[None, :] + tl.minimum(key, 0))
        inside = key + place < end
    else:
        pieces: tl.constexpr = _pieces(page_size, keys)
        start = key + tl.arange(0, pieces) * (keys // pieces)
        place = tl.arange(0, keys // pieces)[None, :, None]
        tile = head + page.to(tl.int64) * page_stride + start % page_size * head_dim
        tile = tile[:, None, None] + (place * head_dim + dim[None, None, :])
        inside = start[:, None, None] + place < end
    return tl.reshape(tl.load(tile, mask=inside, other=0.0), (keys, head_dim))


@triton.jit
def _pieces(page_size: tl.constexpr, keys: tl.constexpr):
    """Pieces of a tile that is larger than a page, or of a page that is no multiple of it."""
    return keys // page_size if keys % page_size == 0 else keys
