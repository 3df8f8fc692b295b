"""A kernel that needs more shared memory than the GPU gives a block is refused before it is launched."""

from typing import Any

import onnx_ir as ir
import pytest

from angelforge.errors import AngelForgeError
from angelforge.plugins.architectures import shared_limit
from angelforge.plugins.kernel import Gpu, Tile
from angelforge.plugins.registry import OPERATORS
from angelforge.plugins.tensorrt import launches
from angelforge.plugins.tensorrt.kernels import find_kernel
from angelforge.plugins.tuning import tile_for

pytest.importorskip("triton")

from angelforge.plugins import compile as compiling
from angelforge.plugins.compile import Compiled

LOGITS = OPERATORS["MoELogits"]
HOPPER, ADA = Gpu("sm_90", 132), Gpu("sm_89", 128)


@pytest.mark.parametrize(("architecture", "most"), [("sm_90", 232_448), ("sm_89", 101_376), ("sm_120", 101_376)])
def test_more_than_a_blocks_share_is_refused(monkeypatch: pytest.MonkeyPatch, architecture: str, most: int) -> None:
    """By the operator's name, with the tile, what it needs and what there is; the last byte may be taken."""
    needed = most

    def compile_kernel(kernel: Any, binding: Any, tile: Tile, architecture: str) -> Compiled:
        return Compiled("logits", "", b"", tile.warps, needed, 0)

    monkeypatch.setattr(compiling, "compile_kernel", compile_kernel)
    arguments = [(4, 128), (16, 128)], [ir.DataType.BFLOAT16, ir.DataType.FLOAT], {}, 8, Gpu(architecture, 78)
    launches._compile.cache_clear()
    assert launches.plan_launch(LOGITS, *arguments).compiled.shared == most == shared_limit(architecture)
    needed += 1
    launches._compile.cache_clear()
    with pytest.raises(AngelForgeError, match=rf"MoELogits cannot .*Tile.*needs {needed} bytes.*has {most}"):
        launches.plan_launch(LOGITS, *arguments)
    launches._compile.cache_clear()


@pytest.mark.parametrize("name", ["MoELogits", "PagedAttention"])
def test_gpus_of_small_blocks_have_their_own_tiles_for_prompts(name: str) -> None:
    """Hopper's stay as they are; steps that decode have one tile on all."""
    kernel = find_kernel(OPERATORS[name])
    assert tile_for(kernel, {}, HOPPER, 8192) == kernel.tile({}, 8192) != tile_for(kernel, {}, ADA, 8192)
    for tokens in (8, 64, 256):
        assert tile_for(kernel, {}, HOPPER, tokens) == tile_for(kernel, {}, ADA, tokens)


def test_drafts_are_verified_in_fewer_rows_without_wgmma() -> None:
    """Fp8GateUp's 64 rows would spill: the tile of 32 serves up to 256 tokens; all others are Hopper's."""
    kernel = find_kernel(OPERATORS["Fp8GateUp"])
    assert tile_for(kernel, {}, ADA, 256) == tile_for(kernel, {}, HOPPER, 64)
    for tokens in (8, 64, 8192):
        assert tile_for(kernel, {}, HOPPER, tokens) == tile_for(kernel, {}, ADA, tokens)
