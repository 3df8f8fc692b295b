"""PTX as TensorRT's ahead-of-time plugins want it: parameters exactly inputs, extras and outputs; no debug sections."""

import re

from angelforge.errors import AngelForgeError
from angelforge.plugins.compile import Compiled

SCRATCH_PARAMETERS = 2  # pointers that Triton appends to every kernel's parameters: global and profiling scratch
_DEBUG_LINE = re.compile(r"^\s*(\.loc|\.file)\s.*\n|^\s*//.*\n", re.MULTILINE)
_DEBUG_SECTION = re.compile(r"^\s*\.section\s+\.debug_\w+\s*\{[^{}]*\}\s*$", re.MULTILINE)


def plugin_ptx(compiled: Compiled, parameters: int) -> str:
    """The kernel's PTX with `parameters` parameters and block size as TensorRT launches it.

    Engines hold the PTX once for every node and profile, so its debug information, more than half of it, goes.

    Raises:
        AngelForgeError: the kernel needs a scratch buffer, which TensorRT does not give, or is not what Triton is
            known to emit.
    """
    if compiled.scratch:
        raise AngelForgeError(f"The kernel {compiled.entry} needs scratch memory, which TensorRT does not give.")
    head = re.search(rf"\.entry {re.escape(compiled.entry)}\((.*?)\)(.*?)\{{", compiled.ptx, re.DOTALL)
    block = head and re.search(r"\.reqntid (\d+)(?:, 1, 1)?\s", head[2])
    if head is None or block is None:
        raise AngelForgeError(
            f"The PTX of {compiled.entry} has no entry with a fixed block size; check Triton's version."
        )
    if int(block[1]) != compiled.warps * 32:
        raise AngelForgeError(
            f"The PTX of {compiled.entry} wants {block[1]} threads a block, but is launched with {compiled.warps * 32}."
        )
    declared = [line.strip() for line in head[1].split(",\n")]
    kept, scratch = declared[:parameters], declared[parameters:]
    names = [line.split()[-1] for line in scratch]
    body = compiled.ptx[head.end() :]
    if len(scratch) != SCRATCH_PARAMETERS or any(re.search(rf"\b{re.escape(name)}\b", body) for name in names):
        raise AngelForgeError(
            f"The kernel {compiled.entry} has {len(declared)} parameters, expected {parameters} and "
            f"{SCRATCH_PARAMETERS} unused ones behind them; check Triton's version."
        )
    start, end = head.span(1)
    cut = compiled.ptx[:start] + "\n\t" + ",\n\t".join(kept) + "\n" + compiled.ptx[end:]
    return _DEBUG_LINE.sub("", _DEBUG_SECTION.sub("", cut))
