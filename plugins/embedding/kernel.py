"""Embedding's kernel: one program copies one piece of one row."""

import triton
import triton.language as tl

from angelforge.plugins.embedding.operator import EMBEDDING
from angelforge.plugins.kernel import Kernel, Tile


@triton.jit(do_not_specialize=["tokens"])
def _embedding(ids, table, tokens, hidden, vocabulary: tl.constexpr, width: tl.constexpr, piece: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * piece + tl.arange(0, piece)
    row = tl.load(ids + token)
    inside = (row >= 0) & (row < vocabulary)
    row = tl.where(inside, row, 0)
    mask = column < width
    values = tl.load(table + row * width + column, mask=mask & inside, other=0.0)
    tl.store(hidden + token * width + column, values.to(hidden.dtype.element_ty), mask=mask)


KERNEL = Kernel(
    operator=EMBEDDING,
    function=_embedding,
    extras=("T",),
    constants=lambda dims, types, tile: {"vocabulary": dims["V"], "width": dims["H"], "piece": tile.n},
    grid=lambda dims, gpu, tile: (dims["T"], (dims["H"] + (tile.n - 1)) // tile.n, 1),
    tile=lambda dims, tokens: Tile(m=1, n=1024, warps=4),
)
