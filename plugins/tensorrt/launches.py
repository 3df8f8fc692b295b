"""What TensorRT needs to launch an operator's kernel: compiled code, grid and integer arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from angelforge.errors import AngelForgeError
from angelforge.plugins.architectures import shared_limit
from angelforge.plugins.binding import Binding, bind
from angelforge.plugins.kernel import Gpu, Kernel, Tile
from angelforge.plugins.operator import Operator
from angelforge.plugins.tensorrt.kernels import find_kernel
from angelforge.plugins.tuning import tile_for, tile_step

if TYPE_CHECKING:
    from angelforge.plugins.compile import Compiled


@dataclass(frozen=True)
class Launch:
    """One launch; `grid` and `extras` hold integers, or symbolic sizes while an engine is built."""

    compiled: "Compiled"
    grid: tuple[Any, Any, Any]
    extras: tuple[Any, ...]


def plan_launch(
    operator: Operator,
    shapes: Sequence[Sequence[Any]],
    types: Sequence[ir.DataType],
    attributes: Mapping[str, int | float],
    most_tokens: int | None,
    gpu: Gpu,
    tile: Tile | None = None,
) -> Launch:
    """How to launch `operator` on inputs of these shapes and types, in a profile of at most `most_tokens` tokens.

    None is the smallest profile that takes the tokens of the shapes. `tile` stands before the tuning table's.

    Raises:
        AngelForgeError: the operator has no kernel, triton is missing, no kernel serves these sizes and types, or the
            compiled one needs more shared memory than a block of this GPU has.
    """
    kernel = find_kernel(operator)
    try:
        binding = bind(operator, shapes, types, attributes)
        if tile is None:
            tokens = tile_step(binding.dims["T"]) if most_tokens is None else most_tokens
            tile = tile_for(kernel, binding.dims, gpu, tokens)
        constants = kernel.constants(binding.dims, binding.types, tile)
        grid = kernel.grid(binding.dims, gpu, tile)
    except ValueError as error:
        raise AngelForgeError(f"The kernel of {operator.name} cannot be launched: {error}") from error
    variant = _Variant(
        operator=operator.name,
        architecture=gpu.architecture,
        tile=tile,
        constants=tuple(sorted(constants.items())),
        types=tuple(binding.types[port.name] for port in (*operator.inputs, *operator.outputs)),
        kernel=kernel,
        binding=binding,
    )
    compiled, limit = _compile(variant), shared_limit(gpu.architecture)
    if compiled.shared > limit:
        raise AngelForgeError(
            f"The kernel of {operator.name} cannot be launched: {tile} needs {compiled.shared} bytes of shared memory, "
            f"a block on {gpu.architecture} has {limit}."
        )
    return Launch(compiled, grid, tuple(binding.dims[name] for name in kernel.extras))


@dataclass(frozen=True)
class _Variant:
    """What tells compiled kernels apart: nodes and steps that agree in it share one."""

    operator: str
    architecture: str
    tile: Tile
    constants: tuple[tuple[str, Any], ...]
    types: tuple[ir.DataType, ...]
    kernel: Kernel = field(compare=False)
    binding: Binding = field(compare=False)


@cache
def _compile(variant: _Variant) -> "Compiled":
    from angelforge.plugins.compile import compile_kernel

    return compile_kernel(variant.kernel, variant.binding, variant.tile, variant.architecture)
