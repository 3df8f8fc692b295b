"""Compiles a kernel for a GPU that need not be there, and counts what the machine code does.

Kernels must have been imported without TRITON_INTERPRET.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx_ir as ir
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from angelforge.errors import AngelForgeError
from angelforge.plugins.binding import Binding
from angelforge.plugins.kernel import Kernel, Tile
from angelforge.plugins.sampling.kernels import TYPES, SamplingKernel

TRITON_TYPES: dict[ir.DataType, str] = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.FLOAT8E4M3FN: "fp8e4nv",
    ir.DataType.INT64: "i64",
    ir.DataType.INT32: "i32",
    ir.DataType.BOOL: "i1",
}
COMPILER = f"Triton {triton.__version__}"
LISTS_CONSTANTS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)  # among what is known of parameters
ALIGNMENT = 16  # bytes, of every pointer
# What may be raised for a tile that a kernel or Triton cannot take; Triton's passes raise RuntimeError.
COMPILE_ERRORS: tuple[type[Exception], ...] = (TritonError, RuntimeError, ValueError, AngelForgeError)

# What is counted in PTX and in SASS, by a regular expression for each instruction.
_PTX = {
    "wgmma e4m3": r"wgmma\.mma_async\S*\.e4m3\.e4m3",
    "wgmma bf16": r"wgmma\.mma_async\S*\.bf16\.bf16",
    "mma.sync f16": r"mma\.sync\S*\.f16",
    "mma.sync bf16": r"mma\.sync\S*\.bf16",
    "mma.sync tf32": r"mma\.sync\S*\.tf32",
    "fp8 to f16": r"cvt\.\S*f16x2\.e4m3x2",
    "f32 to fp8": r"cvt\.rn\.satfinite\.e4m3x2\.f32",
    "16-byte loads": r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.shared\.global[^;]*, 0x10\b|cp\.async\.bulk",
    "8-byte copies": r"cp\.async\.ca\.shared\.global[^;]*, 0x8\b",
    "4-byte copies": r"cp\.async\.ca\.shared\.global[^;]*, 0x4\b",
    "ieee divisions": r"div\.rn\.f32",
}
_SASS = {"instructions": r"/\*[0-9a-f]{4,}\*/ ", "local loads": r"\bLDL\b", "local stores": r"\bSTL\b"}


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel and what is known of it without running it."""

    entry: str  # name of the function in PTX and cubin
    ptx: str
    cubin: bytes
    warps: int
    shared: int  # bytes of shared memory a block
    scratch: int  # bytes of Triton's scratch buffers: 0 unless a kernel needs one

    @cached_property
    def _dump(self) -> str:
        return _dump(self.cubin)  # takes as long as many a compilation: only who asks pays

    @property
    def registers(self) -> int:
        """Of a thread."""
        return int(self._usage[1])

    @property
    def stack(self) -> int:
        """Bytes of a thread."""
        return int(self._usage[2])

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Instructions, as they stand in the code (not as often as they run)."""
        return {
            **{name: len(re.findall(pattern, self.ptx)) for name, pattern in _PTX.items()},
            **{name: len(re.findall(pattern, self._dump)) for name, pattern in _SASS.items()},
        }

    @property
    def _usage(self) -> re.Match[str]:
        usage = re.search(r"REG:(\d+) STACK:(\d+)", self._dump)
        if usage is None:
            raise AngelForgeError(f"cuobjdump reports no resource usage for {self.entry}: {self._dump[:200]!r}.")
        return usage

    @property
    def spills(self) -> int:
        """Loads and stores of registers that found no place."""
        return self.counts["local loads"] + self.counts["local stores"]


def compile_kernel(kernel: Kernel, binding: Binding, tile: Tile, architecture: str = "sm_90") -> Compiled:
    """Compiles one tile of a kernel for one set of weight sizes and types.

    Raises:
        AngelForgeError: the kernel was imported for Triton's interpreter.
    """
    constants = kernel.constants(binding.dims, binding.types, tile)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    types = _types(kernel, binding, constants)
    return _compile(kernel.operator.name, kernel.function, types, constants, options, architecture)


def compile_sampling(kernel: SamplingKernel, architecture: str = "sm_90") -> Compiled:
    """Compiles a kernel that chooses tokens; raises as `compile_kernel`."""
    left_out = dict.fromkeys(kernel.left_out)
    constants = {**left_out, **kernel.constants}
    types = {name: "constexpr" if name in constants else TYPES[name] for name in kernel.function.arg_names}
    options = {"num_warps": kernel.warps}
    return _compile(kernel.function.__name__, kernel.function, types, constants, options, architecture)


def _compile(
    name: str,
    function: Any,
    types: dict[str, str],
    constants: Mapping[str, Any],
    options: dict[str, int],
    architecture: str,
) -> Compiled:
    """A function with these types of all parameters in order; pointers are aligned.

    All is as Triton itself has it when it launches the kernel: its cache then has one entry for the two.
    """
    if not isinstance(function, triton.JITFunction):
        raise AngelForgeError(
            f"The kernel of {name} was imported for Triton's interpreter and cannot be compiled; "
            "start Python without TRITON_INTERPRET."
        )
    aligned: dict[tuple[int, ...], list[list[Any]]] = {
        (i,): [["tt.divisibility", ALIGNMENT]] for i, kind in enumerate(types.values()) if kind.startswith("*")
    }
    if LISTS_CONSTANTS:
        aligned |= {(i,): [] for i, kind in enumerate(types.values()) if kind == "constexpr"}
    compiled: Any = triton.compile(
        ASTSource(function, types, constants, aligned),
        target=GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32),
        options=options,
    )
    metadata = compiled.metadata
    return Compiled(
        entry=metadata.name,
        ptx=compiled.asm["ptx"],
        cubin=compiled.asm["cubin"],
        warps=options["num_warps"],
        shared=metadata.shared,
        scratch=metadata.global_scratch_size + metadata.profile_scratch_size,
    )


def _types(kernel: Kernel, binding: Binding, constants: Mapping[str, Any]) -> dict[str, str]:
    """Triton's types of all parameters in order."""
    inputs = ["*" + TRITON_TYPES[binding.types[port.name]] for port in kernel.operator.inputs]
    outputs = ["*" + TRITON_TYPES[binding.types[port.name]] for port in kernel.operator.outputs]
    types = [*inputs, *("i32" for _ in kernel.extras), *outputs, *("constexpr" for _ in constants)]
    names = kernel.function.arg_names
    if sorted(names[len(types) - len(constants) :]) != sorted(constants) or len(names) != len(types):
        raise ValueError(
            f"{kernel.operator.name}: parameters {names} are not inputs, extras, outputs, {list(constants)}"
        )
    return dict(zip(names, types, strict=True))


def _dump(cubin: bytes) -> str:
    """Resource usage and SASS, by the tools that Triton ships."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        result = subprocess.run([tool, "-res-usage", "-sass", file], capture_output=True, text=True, check=True)
        return result.stdout + result.stderr
