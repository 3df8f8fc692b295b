"""Asks every kernel of a graph whether it serves the sizes and types it is to be launched with, and compiles them.

TensorRT would ask only while it builds, inside a callback whose exceptions it does not understand.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import onnx_ir as ir

from angelforge.engines.profiles import Profile
from angelforge.engines.shapes import Shape, concrete_shapes
from angelforge.engines.tensorrt_progress import Report
from angelforge.errors import AngelForgeError
from angelforge.plugins.binding import Binding, bind
from angelforge.plugins.kernel import Gpu
from angelforge.plugins.operator import DOMAIN, Operator
from angelforge.plugins.registry import OPERATORS
from angelforge.plugins.tensorrt.gpu import newest_ptx
from angelforge.plugins.tensorrt.kernels import find_kernel, kernel_digest
from angelforge.plugins.tensorrt.launches import plan_launch
from angelforge.plugins.tuning import tile_for

_PTX_VERSION = re.compile(r"^\.version (\d+)\.(\d+)", re.MULTILINE)
_FIRST_WITH_FP8 = 89  # Ada; Hopper is 90


@dataclass(frozen=True)
class _Call:
    """A node in a profile, at the most sizes of the profile; calls that are equal are launched alike."""

    node: str
    profile: str
    operator: Operator
    shapes: tuple[Shape, ...]
    types: tuple[ir.DataType, ...]
    attributes: Mapping[str, int | float]

    def bind(self) -> Binding:
        """Symbols and types of the call."""
        return bind(self.operator, self.shapes, self.types, self.attributes)

    def refused(self, error: Exception) -> AngelForgeError:
        """The message when its kernel does not serve it."""
        return AngelForgeError(
            f"No kernel serves the layer {self.node} ({self.operator.name}) in profile {self.profile}: {error}."
        )


def check_kernels(model: ir.Model, profiles: Sequence[Profile], gpu: Gpu) -> None:
    """Evaluates the launch rules of a prepared graph's kernels in every profile, for the tiles of a build, uncompiled.

    Without triton nothing can be asked, and nothing is.

    Raises:
        AngelForgeError: naming the layer, its operator, and what its kernel cannot serve.
    """
    if find_spec("triton") is None:
        return
    for call in _calls(model, profiles):
        kernel = find_kernel(call.operator)
        if ir.DataType.FLOAT8E4M3FN in call.types and int(gpu.architecture.removeprefix("sm_")) < _FIRST_WITH_FP8:
            raise call.refused(ValueError(f"FP8 needs sm_{_FIRST_WITH_FP8} or newer, the GPU is {gpu.architecture}"))
        try:
            binding = call.bind()
            tile = tile_for(kernel, binding.dims, gpu, binding.dims["T"])
            kernel.constants(binding.dims, binding.types, tile)
            kernel.grid(binding.dims, gpu, tile)
        except ValueError as error:
            raise call.refused(error) from error


def compile_kernels(model: ir.Model, profiles: Sequence[Profile], gpu: Gpu, report: Report) -> None:
    """Compiles all kernels of a prepared graph; the process keeps them for the plugins that ask for them.

    Raises:
        AngelForgeError: naming the operator whose kernel cannot be compiled or needs more shared memory than the GPU
            gives a block, triton is not installed, or its PTX is newer than the driver.
    """
    calls, newest = list(_calls(model, profiles)), newest_ptx()
    for i, call in enumerate(calls):
        report("Compiling kernels", i / len(calls))
        launch = plan_launch(call.operator, call.shapes, call.types, call.attributes, call.bind().dims["T"], gpu)
        _check_ptx(launch.compiled.ptx, newest)
    report("Compiling kernels", 1.0)


def _check_ptx(ptx: str, newest: tuple[int, int] | None) -> None:
    """Refuses PTX that the driver could not compile when the engine is loaded; it takes machine code of newer tools."""
    found = _PTX_VERSION.search(ptx)
    if newest is not None and found is not None and (int(found[1]), int(found[2])) > newest:
        raise AngelForgeError(
            f"The kernels are PTX {found[1]}.{found[2]}, but the NVIDIA driver compiles up to PTX {newest[0]}."
            f"{newest[1]}: Triton's assembler is newer than the driver. Install a newer driver, or unset "
            "TRITON_PTXAS_PATH if it names another assembler than Triton's own."
        )


def _calls(model: ir.Model, profiles: Sequence[Profile]) -> Iterator[_Call]:
    seen = set()
    for profile in profiles:
        shapes = concrete_shapes(model, profile.most())
        for node in model.graph:
            if node.domain != DOMAIN or kernel_digest(OPERATORS[node.op_type]) == "none":
                continue
            operator, inputs = OPERATORS[node.op_type], [value for value in node.inputs if value is not None]
            call = _Call(
                node=node.name or "",
                profile=profile.name,
                operator=operator,
                shapes=tuple(shapes[value] for value in inputs),
                types=tuple(value.dtype for value in inputs if value.dtype is not None),
                attributes={a.name: a.kind(node.attributes[a.name].value) for a in operator.attributes},
            )
            key = (operator.name, call.shapes, call.types, tuple(call.attributes.items()))
            if key not in seen:
                seen.add(key)
                yield call
