"""Persistent kernels: as many programs as the GPU holds at a time, whatever the number of tokens."""

import onnx_ir as ir
import pytest

from angelforge.plugins.binding import bind
from angelforge.plugins.fp8_moe_down.kernel import KERNEL as FP8_DOWN
from angelforge.plugins.fp8_moe_gate_up.kernel import KERNEL as FP8_GATE_UP
from angelforge.plugins.kernel import Gpu, Kernel
from angelforge.plugins.moe_down.kernel import KERNEL as DOWN
from angelforge.plugins.moe_gate_up.kernel import KERNEL as GATE_UP
from angelforge.plugins.paged_attention.kernel import KERNEL as ATTENTION

SMS = 78
PERSISTENT = [GATE_UP, DOWN, FP8_GATE_UP, FP8_DOWN, ATTENTION]
WEIGHTS = {"E": 257, "I": 1024, "H": 4096, "IG": 8, "HG": 32, "k": 9, "Hq": 32, "Hkv": 4, "D": 128}
POOL = {"page_size": 64, "pages": 4000, "P": 512}
ATTRIBUTES = {"dtype": 16, "scale": 0.088, "split_length": 256, "split_queries": 8}
TYPES = {"A": ir.DataType.BFLOAT16, "W": ir.DataType.BFLOAT16}


def dims_of(kernel: Kernel, tokens: int) -> dict[str, int]:
    """The full model's sizes in a step of so many tokens, one sequence each."""
    operator = kernel.operator
    sizes = {**WEIGHTS, **POOL, "T": tokens, "B": tokens, "B1": tokens + 1, "words": -(-tokens // 128) * 4}
    shapes = [[size if isinstance(size, int) else sizes[size] for size in port.shape] for port in operator.inputs]
    types = [TYPES.get(port.type) or ir.DataType[port.type] for port in operator.inputs]
    attributes = {attribute.name: ATTRIBUTES[attribute.name] for attribute in operator.attributes}
    return dict(bind(operator, shapes, types, attributes).dims)


@pytest.mark.parametrize("kernel", PERSISTENT, ids=lambda kernel: kernel.operator.name)
@pytest.mark.parametrize("tokens", [1, 8192])
def test_a_persistent_grid_is_what_the_gpu_holds(kernel: Kernel, tokens: int) -> None:
    """Blocks of an SM times SMs; that an SM holds them is asserted of the machine code (tests/tools)."""
    dims = dims_of(kernel, tokens)
    tile = kernel.tile(dims, tokens)
    assert kernel.grid(dims, Gpu("sm_90", SMS), tile) == (SMS * tile.blocks_per_sm, 1, 1)
