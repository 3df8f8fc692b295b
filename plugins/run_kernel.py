"""Launches an operator's kernel on torch tensors: on a GPU, or on CPU tensors in Triton's interpreter."""

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch

from angelforge.plugins.binding import Binding, bind
from angelforge.plugins.kernel import Gpu, Kernel, Tile
from angelforge.plugins.tuning import tile_for

Attributes = Mapping[str, int | float]

TORCH_TYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.BOOL: torch.bool,
}
ONNX_TYPES: dict[torch.dtype, ir.DataType] = {value: key for key, value in TORCH_TYPES.items()}


def run(
    kernel: Kernel,
    inputs: Sequence[torch.Tensor],
    attributes: Attributes,
    *,
    gpu: Gpu,
    tile: Tile | None = None,
    profile_tokens: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """The operator's outputs, computed by its kernel; an aliased output is its input, changed in place.

    The tile is `tile`, else that of the tuning table or of the kernel's rule for a profile of at most `profile_tokens`
    tokens (default: the T of this call). Tensors on the CPU need a kernel imported with TRITON_INTERPRET=1.

    Raises:
        ValueError: inputs or attributes contradict the operator's definition.
    """
    binding = bind_tensors(kernel, inputs, attributes)
    if tile is None:
        tokens = binding.dims.get("T", 1) if profile_tokens is None else profile_tokens
        tile = tile_for(kernel, binding.dims, gpu, tokens)
    outputs = allocate(kernel, inputs, binding)
    launch(kernel, inputs, outputs, binding, gpu, tile)
    return outputs


def bind_tensors(kernel: Kernel, inputs: Sequence[torch.Tensor], attributes: Attributes) -> Binding:
    """The binding of a call with these tensors."""
    types = [ONNX_TYPES[tensor.dtype] for tensor in inputs]
    return bind(kernel.operator, [tuple(tensor.shape) for tensor in inputs], types, attributes)


def allocate(kernel: Kernel, inputs: Sequence[torch.Tensor], binding: Binding) -> tuple[torch.Tensor, ...]:
    """Outputs of the shapes and types of the operator's rules, uninitialised; aliased ones are their inputs."""
    operator = kernel.operator
    sources = {port.name: tensor for port, tensor in zip(operator.inputs, inputs, strict=True)}
    return tuple(
        sources[operator.aliases[port.name]]
        if port.name in operator.aliases
        else torch.empty(shape, dtype=TORCH_TYPES[binding.types[port.name]], device=inputs[0].device)
        for port, shape in zip(operator.outputs, binding.output_shapes, strict=True)
    )


def launch(
    kernel: Kernel,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    binding: Binding,
    gpu: Gpu,
    tile: Tile,
) -> None:
    """One launch, asynchronous on a GPU, on torch's current stream. Tensors must be contiguous.

    Raises:
        ValueError: a tensor is not contiguous.
    """
    for port, tensor in zip((*kernel.operator.inputs, *kernel.operator.outputs), (*inputs, *outputs), strict=True):
        if not tensor.is_contiguous():
            raise ValueError(f"{kernel.operator.name}: {port.name} is not contiguous; kernels read packed tensors")
    extras = [int(binding.dims[symbol]) for symbol in kernel.extras]
    kernel.function[kernel.grid(binding.dims, gpu, tile)](
        *inputs,
        *extras,
        *outputs,
        **kernel.constants(binding.dims, binding.types, tile),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
