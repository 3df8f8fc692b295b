"""Cutting Triton's scratch parameters and debug sections out of PTX, and refusing what is not as expected."""

import dataclasses
import re

import pytest

pytest.importorskip("triton")

from angelforge.errors import AngelForgeError
from angelforge.plugins.compile import Compiled
from angelforge.plugins.tensorrt.ptx import plugin_ptx

PTX = """
.version 8.8
.target sm_90a
.visible .entry add(
	.param .u64 .ptr .global .align 1 add_param_0,
	.param .u32 add_param_1,
	.param .u64 .ptr .global .align 1 add_param_2,
	.param .u64 .ptr .global .align 1 add_param_3,
	.param .u64 .ptr .global .align 1 add_param_4
)
.reqntid 128
{
	.loc	1 17 0                          // kernel.py:17:0
// %bb.0:
	ld.param.b64 	%rd14, [add_param_2];
	ret;
}
	.file	1 "somewhere/kernel.py"
	.section	.debug_abbrev
	{
.b8 1                                   // Abbreviation Code
	}
	.section	.debug_macinfo	{	}
"""
ADD = Compiled("add", PTX, b"", warps=4, shared=0, scratch=0)


def test_the_two_last_parameters_go() -> None:
    cut = plugin_ptx(ADD, 3)
    assert re.findall(r"\.param .*?(\w+),?$", cut, re.MULTILINE) == ["add_param_0", "add_param_1", "add_param_2"]
    assert "ld.param.b64 \t%rd14, [add_param_2];" in cut


def test_debug_information_goes() -> None:
    """Instructions stay; lines, files and sections about sources do not."""
    cut = plugin_ptx(ADD, 3)
    assert not re.search(r"\.loc|\.file|debug|kernel\.py|//", cut)
    assert ".reqntid 128\n{" in cut
    assert "ret;\n}" in cut


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scratch": 64}, "needs scratch memory, which TensorRT does not give"),
        ({"warps": 8}, "wants 128 threads a block, but is launched with 256"),
        ({"entry": "other"}, "has no entry with a fixed block size"),
        ({"ptx": PTX.replace(".reqntid 128", "")}, "has no entry with a fixed block size"),
        ({"ptx": PTX.replace("[add_param_2]", "[add_param_4]")}, "expected 3 and 2 unused ones behind them"),
        ({"ptx": PTX.replace("add_param_3,", "add_param_3,\n\t.param .u64 x,")}, "has 6 parameters, expected 3"),
    ],
)
def test_the_unexpected_is_refused(change: dict[str, object], message: str) -> None:
    """Another version of Triton may emit other PTX: better no engine than one that reads wrong arguments."""
    with pytest.raises(AngelForgeError, match=message):
        plugin_ptx(dataclasses.replace(ADD, **change), 3)  # type: ignore[arg-type]
