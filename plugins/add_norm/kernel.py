"""AddNorm's kernel: a program adds and normalises one row."""

import triton
import triton.language as tl

from angelforge.plugins.add_norm.operator import ADD_NORM
from angelforge.plugins.device.launch import norm_constants, norm_tile, row_grid
from angelforge.plugins.device.norm import load_row, normalized, store_row
from angelforge.plugins.device.numbers import round_to
from angelforge.plugins.kernel import Kernel


@triton.jit(do_not_specialize=["tokens"])
def _add_norm(
    residual,
    delta,
    weight,
    tokens,
    residual_out,
    normed,
    width: tl.constexpr,
    groups: tl.constexpr,
    epsilon: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    total = load_row(residual, row, width, groups) + load_row(delta, row, width, groups)
    total = round_to(total, residual_out.dtype.element_ty)
    store_row(residual_out, row, total, width, groups)
    y = normalized(total, weight, normed.dtype.element_ty, width, groups, epsilon)
    store_row(normed, row, y, width, groups)


KERNEL = Kernel(
    operator=ADD_NORM,
    function=_add_norm,
    extras=("T",),
    constants=norm_constants,
    grid=row_grid,
    tile=norm_tile,
)
