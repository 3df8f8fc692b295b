"""PagedAttention's kernel: persistent programs take pieces of work that they derive from the batch themselves.

A sequence with few tokens is cut into parts of `split_length` keys (Flash-Decoding): pieces of equal size, so that one
sequence of 128K keys beside many short ones keeps every SM busy. A longer chunk of tokens is cut into tiles of query
rows, each over all of its visible keys. A row is one query head of one token; the rows of a tile share a key/value
head.

Decoding, verification and chunks in the profiles of up to 256 tokens have one arithmetic, part by part
(`device.attention`): a token's result does not depend on which of these ways its sequence goes. Chunks of more than
`split_queries` tokens in the profile of prompts (kind LONG) have another: query rows on the tensor core's wide side,
64 keys a step, no parts. That is the same for every cut of a prompt into such chunks, but not the same to the last bits
as decoding.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import onnx_ir as ir
import triton
import triton.language as tl

from angelforge.plugins.device.attention import finished, inverse, nothing, products, shares, step
from angelforge.plugins.device.pages import load_tile, pages_of
from angelforge.plugins.device.sequences import both, high_of, longest_of, low_of, part_rows, pieces_of, rows_of
from angelforge.plugins.kernel import Gpu, Kernel, Tile
from angelforge.plugins.paged_attention.operator import PAGED_ATTENTION

_KEYS = 32  # of a tile: two tiles of keys and values in shared memory fit in 48 KB
# Of a head: tiles of 256 dims pass 48 KB of shared memory when decoding, and all of an SM's with prompts.
_MOST_DIMS = 128
_ROWS = 32  # query rows of a piece when draft tokens are verified

# Kinds of pieces: of parts with few query rows (plain decoding) and with more (verification); of all keys of a sequence
# that is short but not left in parts, and of a chunk of a prompt, the only ones that are not joined by parts.
FEW, MORE, SHORT, LONG = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


class Constants(NamedTuple):
    """What is known when the kernel is compiled."""

    heads: int
    kv_heads: int
    group: int  # query heads of a key/value head
    head_dim: int
    page_size: int
    scale: float
    split_length: int
    split_queries: int
    few: int  # query rows of a piece of kind FEW and SHORT
    more: int  # of kind MORE
    many: int  # of kind LONG
    keys: int  # of a tile of kind FEW, MORE and SHORT
    many_keys: int  # of kind LONG
    chunk: int  # sequences whose pieces are listed at once


class Call(NamedTuple):
    """The kernel's arguments."""

    query: Any
    kv_cache: Any
    page_table: Any
    query_start: Any
    kv_length: Any
    positions: Any
    tokens: Any
    batch: Any
    table_width: Any
    pages: Any
    capacity: Any
    direct: Any
    partial: Any
    lse: Any
    partial_start: Any


@triton.jit
def _attend(
    query,
    limit,
    first,
    end,
    call,
    table,
    kv_head,
    c: tl.constexpr,
    rows: tl.constexpr,
    keys: tl.constexpr,
    stages: tl.constexpr,
    tall: tl.constexpr,
    joins: tl.constexpr,
):
    """Keys first … end − 1 of one head for a tile of query rows, of which row r sees keys ≤ limit[r].

    (result, lse [rows]) of one part, or with `joins` (Σ of parts, Σ of their factors [rows]), all f32.
    """
    over_keys: tl.constexpr = 1 if tall else 0
    page_stride: tl.constexpr = 2 * c.kv_heads * c.page_size * c.head_dim
    keys_of_head = call.kv_cache + kv_head * (c.page_size * c.head_dim)
    values_of_head = keys_of_head + c.kv_heads * c.page_size * c.head_dim
    top, weight, mixed = nothing(rows, c.head_dim, tall)
    joined_top, joined_weight, joined = top, weight, mixed
    page = pages_of(table, first, end, call.pages, c.page_size, keys)
    for key in tl.range(first, end, keys, num_stages=stages):
        k = load_tile(keys_of_head, page, key, end, page_stride, c.page_size, c.head_dim, keys)
        v = load_tile(values_of_head, page, key, end, page_stride, c.page_size, c.head_dim, keys)
        page = pages_of(table, key + keys, end, call.pages, c.page_size, keys)
        own = tl.expand_dims(key + tl.arange(0, keys), 1 - over_keys)
        visible = own <= tl.expand_dims(limit, over_keys)
        top, weight, mixed = step(products(k, query, tall), v, visible, top, weight, mixed, c.scale, tall)
        if joins and ((key + keys) % c.split_length == 0) | (key + keys >= end):  # the part ends here
            part, lse = finished(top, weight, mixed, tall)
            joined_top, fade, share = shares(lse, joined_top)
            joined = joined * tl.expand_dims(fade, over_keys)
            joined = tl.fma(part, tl.expand_dims(share, over_keys), joined)
            joined_weight = tl.fma(joined_weight, fade, share)
            top, weight, mixed = nothing(rows, c.head_dim, tall)
    if joins:
        return joined, joined_weight
    else:  # noqa: RET505
        return finished(top, weight, mixed, tall)


@triton.jit
def _piece(
    call,
    sequence,
    local,
    begin,
    count,
    length,
    first_row,
    c: tl.constexpr,
    kind: tl.constexpr,
):
    """Piece `local` of a sequence: a tile of query rows over one part of the keys, or over all of them."""
    rows: tl.constexpr = c.many if kind == LONG else c.more if kind == MORE else c.few
    keys: tl.constexpr = c.many_keys if kind == LONG else c.keys
    stages: tl.constexpr = 2 if kind == MORE else None  # the tile's; with more rows, three would pass 48 KB
    tall: tl.constexpr = kind == LONG
    whole: tl.constexpr = kind >= SHORT
    over_keys: tl.constexpr = 1 if tall else 0
    tiles = (count * c.group + (rows - 1)) // rows
    if whole:  # the last tiles see the most keys: they come first
        kv_head, tile, part = local % c.kv_heads, tiles - 1 - local // c.kv_heads, 0
    else:  # pieces that share keys are neighbours: they meet in the L2 cache
        tile, kv_head, part = local % tiles, local // tiles % c.kv_heads, local // (tiles * c.kv_heads)
    row = tile * rows + tl.arange(0, rows)
    exists = row < count * c.group
    token = begin + row // c.group
    limit = tl.minimum(tl.load(call.positions + token, mask=exists, other=-1), length - 1)  # last key that a row sees
    place = token.to(tl.int64) * c.heads + kv_head * c.group + row % c.group
    dim = tl.arange(0, c.head_dim)
    query = tl.load(call.query + place[:, None] * c.head_dim + dim[None, :], mask=exists[:, None], other=0.0)
    if not tall:
        query = tl.trans(query)
    first = part * c.split_length
    end = tl.max(limit) + 1 if whole else tl.minimum(first + c.split_length, length)
    table = call.page_table + sequence.to(tl.int64) * call.table_width
    result, other = _attend(query, limit, first, end, call, table, kv_head, c, rows, keys, stages, tall, kind == SHORT)
    if kind == SHORT:
        result *= tl.expand_dims(inverse(other), over_keys)
    if whole:
        target = call.direct
        result = result.to(target.dtype.element_ty)
    else:
        target = call.partial
        parts = (length + (c.split_length - 1)) // c.split_length
        place = (first_row + (row // c.group).to(tl.int64) * parts + part) * c.heads + kv_head * c.group + row % c.group
        tl.store(call.lse + place, other, mask=exists)
    target = target + (tl.expand_dims(place, over_keys) * c.head_dim + tl.expand_dims(dim, 1 - over_keys))
    tl.store(target, result, mask=tl.expand_dims(exists, over_keys))


@triton.jit
def _kinds(count, in_parts, c: tl.constexpr):
    """int32 [chunk]: the kind of each sequence's pieces; 4 for none."""
    parts = tl.where((count * c.group <= c.few) | (c.few == c.more), FEW, MORE)
    whole = tl.where((count <= c.split_queries) | (c.many == c.few), SHORT, LONG)
    return tl.where(count > 0, tl.where(in_parts, parts, whole), 4)


@triton.jit
def _all_of_kind(kind: tl.constexpr, batch, piece, passed, call, c: tl.constexpr):
    """This program's pieces of one kind: `piece` is its next one, `passed` pieces of other kinds come before.

    Each kind has a loop of its own: one loop for all would hold the addresses of all in registers. Returns
    (its next piece, pieces so far, which other kinds there are as bits 8 · kind, rows of all sequences).
    """
    rows: tl.constexpr = c.many if kind == LONG else c.more if kind == MORE else c.few
    index = tl.arange(0, c.chunk)
    longest = longest_of(call.table_width, c.page_size)
    first, before, taken, others = 0, 0, 0, 0  # first sequence of this chunk; rows, and rows of `partial`, before it
    while first < batch:  # one turn is one piece, or goes on to the next chunk; little is kept from turn to turn
        begin, count, length = rows_of(
            call.query_start, call.kv_length, first, call.batch, call.tokens, longest, before, c.chunk
        )
        first_row, wanted = part_rows(count, length, taken, call.capacity, c.split_length, c.split_queries)
        kinds = _kinds(count, first_row >= 0, c)
        pieces = pieces_of(count, length, kind < SHORT, rows, c.kv_heads, c.group, c.split_length)
        pieces = tl.where(kinds == kind, pieces, 0)
        ends = passed + tl.cumsum(pieces, 0)
        last = tl.max(ends)
        if last > piece:
            own = (piece < ends) & (ends - pieces <= piece)  # one sequence
            place = tl.sum(tl.where(own, both(first + index, piece - ends + pieces), 0))
            token = tl.sum(tl.where(own, both(begin, count), 0))
            cached = tl.sum(tl.where(own, both(length, first_row + 1), 0))
            _piece(
                call,
                high_of(place),
                low_of(place),
                high_of(token),
                low_of(token),
                high_of(cached),
                low_of(cached) - 1,
                c,
                kind,
            )
            piece += tl.num_programs(0)
        else:
            if kind == FEW:
                others |= tl.sum(tl.where((kinds > FEW) & (kinds <= LONG), 1 << (kinds * 8), 0))
                if tl.program_id(0) == 0:
                    tl.store(call.partial_start + first + index, first_row, mask=first + index < call.batch)
            taken = tl.minimum(taken, 1 << 26) + tl.sum(wanted)
            before, passed, first = tl.max(begin + count), last, first + c.chunk
    return piece, passed, others, before


@triton.jit
def _clear_rows(call, last, c: tl.constexpr):
    """Rows of no sequence give 0; `last` is the first row after the sequences."""
    width: tl.constexpr = c.heads * c.head_dim
    column = tl.arange(0, triton.next_power_of_2(width))
    first = tl.load(call.query_start)
    for row in range(tl.program_id(0), call.tokens, tl.num_programs(0)):
        if (row < first) | (row >= last):
            target = call.direct + tl.cast(row, tl.int64) * width + column
            tl.store(target, tl.zeros_like(column).to(target.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["tokens", "batch", "table_width", "pages", "capacity"])
def _paged_attention(
    query,
    kv_cache,
    page_table,
    query_start,
    kv_length,
    positions,
    tokens,
    batch,
    table_width,
    pages,
    capacity,
    direct,
    partial,
    lse,
    partial_start,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    page_size: tl.constexpr,
    scale: tl.constexpr,
    split_length: tl.constexpr,
    split_queries: tl.constexpr,
    few: tl.constexpr,
    more: tl.constexpr,
    many: tl.constexpr,
    keys: tl.constexpr,
    many_keys: tl.constexpr,
    chunk: tl.constexpr,
):
    c: tl.constexpr = Constants(
        heads, kv_heads, heads // kv_heads, head_dim, page_size, scale, split_length, split_queries,
        few, more, many, keys, many_keys, chunk,
    )  # fmt: skip
    call = Call(
        query, kv_cache, page_table, query_start, kv_length, positions, tokens, batch, table_width, pages, capacity,
        direct, partial, lse, partial_start,
    )  # fmt: skip
    piece, passed, others, last = _all_of_kind(FEW, batch, tl.program_id(0), tl.full([], 0, tl.int32), call, c)
    if more > few:
        piece, passed, _others, _last = _all_of_kind(
            MORE, tl.where((others >> 8) & 255 > 0, batch, 0), piece, passed, call, c
        )
    if many > few:
        piece, passed, _others, _last = _all_of_kind(
            LONG, tl.where((others >> 24) & 255 > 0, batch, 0), piece, passed, call, c
        )
    _all_of_kind(SHORT, tl.where((others >> 16) & 255 > 0, batch, 0), piece, passed, call, c)
    _clear_rows(call, last, c)


def _constants(dims: Mapping[str, Any], types: Mapping[str, ir.DataType], tile: Tile) -> dict[str, Any]:
    if dims["scale"] <= 0:
        raise ValueError(f"PagedAttention's kernel needs a positive scale, got {dims['scale']}")
    if dims["split_length"] % _KEYS:
        raise ValueError(
            f"PagedAttention's kernel needs a split_length in multiples of {_KEYS}, got {dims['split_length']}"
        )
    if not 16 <= dims["D"] <= _MOST_DIMS or dims["D"] & (dims["D"] - 1):
        raise ValueError(
            f"PagedAttention's kernel needs a head_dim that is a power of two from 16 to {_MOST_DIMS}, got {dims['D']}"
        )
    return {
        "heads": dims["Hq"],
        "kv_heads": dims["Hkv"],
        "head_dim": dims["D"],
        "page_size": dims["page_size"],
        "scale": dims["scale"],
        "split_length": dims["split_length"],
        "split_queries": dims["split_queries"],
        "few": min(tile.m, _ROWS),
        "more": _ROWS,
        "many": tile.m,
        "keys": _KEYS,
        "many_keys": tile.n,
        "chunk": tile.k,
    }


def _grid(dims: Mapping[str, Any], gpu: Gpu, tile: Tile) -> tuple[Any, Any, Any]:
    return gpu.sms * tile.blocks_per_sm, 1, 1


def _tile(dims: Mapping[str, Any], tokens: int) -> Tile:
    """m: query rows (tokens × group) of a piece, n: keys, k: sequences whose pieces are listed at once."""
    if tokens <= 256:
        return Tile(m=16, n=32, k=32, warps=4, stages=3, blocks_per_sm=2)  # Triton 3.6 takes 177 registers
    return Tile(m=128, n=64, k=32, warps=8, stages=3, blocks_per_sm=1)


def _small_tile(dims: Mapping[str, Any], tokens: int) -> Tile:
    if tokens <= 256:
        return _tile(dims, tokens)
    return Tile(m=64, n=64, k=32, warps=8, stages=2, blocks_per_sm=1)  # 128 rows spill without Hopper's wgmma


KERNEL = Kernel(
    operator=PAGED_ATTENTION,
    function=_paged_attention,
    extras=("T", "B", "P", "pages", "C"),
    constants=_constants,
    grid=_grid,
    tile=_tile,
    small_tile=_small_tile,
)
