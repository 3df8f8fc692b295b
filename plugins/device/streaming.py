"""A kernel that only reads: what bandwidth a GPU's memory gives at best, beside which others are measured."""

import triton
import triton.language as tl


@triton.jit
def read_all(source, blocks, sums, block: tl.constexpr):
    """Reads int32 [blocks · block]; program p stores the 32-bit sum of its blocks p, p + programs, … to sums[p]."""
    place = tl.arange(0, block)
    total = tl.zeros([block], tl.int32)
    for number in range(tl.program_id(0), blocks, tl.num_programs(0)):
        total += tl.load(source + tl.cast(number, tl.int64) * block + place)
    tl.store(sums + tl.program_id(0), tl.sum(total))
