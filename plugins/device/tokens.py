"""Which rows of a packed batch and which output channels a program works on."""

import triton
import triton.language as tl


@triton.jit
def tile_of(tokens, channels: tl.constexpr, m: tl.constexpr, n: tl.constexpr):
    """(token [m], existing row [m], both int64; first channel) of this program's tile of a [tokens, channels] output.

    Programs that share weights are neighbours in time when there are few tokens, those that share tokens otherwise:
    with g = 8 row tiles a group, what a wave of programs reads stays in the L2 cache.
    """
    columns: tl.constexpr = (channels + n - 1) // n
    group: tl.constexpr = 8
    program = tl.program_id(0)
    before = program // (group * columns) * group
    size = tl.minimum((tokens + m - 1) // m - before, group)
    within = program % (group * columns)
    row = before + within % size
    token = row.to(tl.int64) * m + tl.arange(0, m)
    return token, tl.minimum(token, tokens - 1), within // size * n
