"""The sequences of a packed batch as attention's work: pieces numbered without gaps over all sequences.

Every program derives the same numbers from `query_start` and `kv_length`, for `chunk` sequences at a time, and takes
each n-th piece. Integers of any value divide rows 0 … T − 1 properly: starts are clamped and made to rise, lengths are
clamped.

A piece is one key/value head, one tile of query rows (tokens × group) and, if the sequence is left in parts, one part
of its keys.
"""

import triton
import triton.language as tl


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def longest_of(table_width, page_size: tl.constexpr):
    """Keys that a row of the page table can name, at most 2²⁴, so that sums of parts and pieces fit in 32 bits."""
    return tl.minimum(table_width, (1 << 24) // page_size) * page_size


@triton.jit
def rows_of(query_start, kv_length, first, batch, tokens, longest, before, chunk: tl.constexpr):
    """(begin, count, length) int32 [chunk] of sequences `first` …: rows of the batch that rise from `before` on, keys.

    Sequences from `batch` on are empty.
    """
    index = first + tl.arange(0, chunk)
    inside = index < batch
    begin = tl.load(query_start + index, mask=inside, other=0)
    end = tl.load(query_start + index + 1, mask=inside, other=0)
    length = tl.load(kv_length + index, mask=inside, other=0)
    begin = tl.associative_scan(tl.minimum(tl.maximum(begin, before), tokens), 0, _larger)
    return begin, tl.maximum(tl.minimum(end, tokens) - begin, 0), tl.minimum(tl.maximum(length, 0), longest)


@triton.jit
def part_rows(count, length, taken, capacity, split_length: tl.constexpr, split_queries: tl.constexpr):
    """(first row in `partial` or −1, rows wanted), int32 [chunk]: which sequences are left in parts.

    Those with at most `split_queries` tokens; rows are given out in order from `taken` on, and who comes after they are
    used up is not left in parts. What is wanted beyond the capacity (clamped to 2²⁵ rows) is counted as one row more.
    """
    parts = (length + (split_length - 1)) // split_length
    most = tl.minimum(capacity, 1 << 25)
    wanted = tl.where(count <= split_queries, tl.minimum(tl.minimum(count, split_queries) * parts, most + 1), 0)
    last = tl.minimum(taken, most + 1) + tl.cumsum(wanted, 0)
    return tl.where((wanted > 0) & (last <= most), last - wanted, -1), wanted


@triton.jit
def pieces_of(
    count, length, in_parts: tl.constexpr, tile_rows: tl.constexpr, kv_heads: tl.constexpr, group: tl.constexpr, split
):
    """int32 [chunk]: pieces of each sequence if its tiles have `tile_rows` query rows.

    Their sum is small: parts are bounded by the capacity of `partial`, tiles by the rows of the query.
    """
    pieces = (count * group + (tile_rows - 1)) // tile_rows * kv_heads
    return pieces * ((length + (split - 1)) // split) if in_parts else pieces


@triton.jit
def both(high, low):
    """Two int32 values ≥ 0 in one int64, so that one reduction picks both."""
    return (high.to(tl.int64) << 32) | low.to(tl.int64)


@triton.jit
def high_of(pair):
    """The first value of `both`."""
    return (pair >> 32).to(tl.int32)


@triton.jit
def low_of(pair):
    """The second value of `both`."""
    return (pair & 0xFFFFFFFF).to(tl.int32)
