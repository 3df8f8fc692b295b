"""NormQuantize's kernel: a program normalises and quantises one row."""

import triton
import triton.language as tl

from angelforge.plugins.device.launch import norm_constants, norm_tile, row_grid
from angelforge.plugins.device.norm import load_row, normalized, store_quantized, store_row
from angelforge.plugins.kernel import Kernel
from angelforge.plugins.norm_quantize.operator import NORM_QUANTIZE


@triton.jit(do_not_specialize=["tokens"])
def _norm_quantize(
    hidden, weight, tokens, normed, quantized, scale, width: tl.constexpr, groups: tl.constexpr, epsilon: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x = load_row(hidden, row, width, groups)
    y = normalized(x, weight, normed.dtype.element_ty, width, groups, epsilon)
    store_row(normed, row, y, width, groups)
    store_quantized(quantized, scale, row, y, width, groups)


KERNEL = Kernel(
    operator=NORM_QUANTIZE,
    function=_norm_quantize,
    extras=("T",),
    constants=norm_constants,
    grid=row_grid,
    tile=norm_tile,
)
