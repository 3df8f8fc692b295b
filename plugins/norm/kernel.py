"""Norm's kernel: a program normalises one row."""

import triton
import triton.language as tl

from angelforge.plugins.device.launch import norm_constants, norm_tile, row_grid
from angelforge.plugins.device.norm import load_row, normalized, store_row
from angelforge.plugins.kernel import Kernel
from angelforge.plugins.norm.operator import NORM


@triton.jit(do_not_specialize=["tokens"])
def _norm(hidden, weight, tokens, normed, width: tl.constexpr, groups: tl.constexpr, epsilon: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x = load_row(hidden, row, width, groups)
    y = normalized(x, weight, normed.dtype.element_ty, width, groups, epsilon)
    store_row(normed, row, y, width, groups)


KERNEL = Kernel(
    operator=NORM,
    function=_norm,
    extras=("T",),
    constants=norm_constants,
    grid=row_grid,
    tile=norm_tile,
)
