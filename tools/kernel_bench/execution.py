"""Runs a call on the GPU in three ways: as the Python plugin does, as TensorRT does from cut PTX, as Triton does."""

from collections.abc import Sequence

import torch

from angelforge.plugins import run_kernel
from angelforge.plugins.kernel import Gpu, Tile
from angelforge.plugins.tensorrt import driver
from angelforge.plugins.tensorrt.kernels import find_kernel
from angelforge.plugins.tensorrt.launches import Launch, plan_launch
from angelforge.plugins.tensorrt.ptx import plugin_ptx
from angelforge.tools.kernel_bench.costs import binding_of, port_types
from angelforge.tools.kernel_bench.work import Work

Tensors = Sequence[torch.Tensor]


def plan(work: Work, inputs: Tensors, gpu: Gpu, tile: Tile | None = None) -> Launch:
    """The launch that TensorRT's plugins make for these inputs."""
    shapes = [tuple(tensor.shape) for tensor in inputs]
    return plan_launch(work.operator, shapes, port_types(work), work.attributes, None, gpu, tile)


def outputs_for(work: Work, inputs: Tensors) -> tuple[torch.Tensor, ...]:
    """Zeros for the outputs; an aliased one is its input."""
    outputs = run_kernel.allocate(find_kernel(work.operator), inputs, binding_of(work))
    for port, tensor in zip(work.operator.outputs, outputs, strict=True):
        if port.name not in work.operator.aliases:
            tensor.view(torch.uint8).zero_()
    return outputs


def by_driver(launch: Launch, inputs: Tensors, outputs: Tensors) -> None:
    """Enqueues the cubin on torch's current stream."""
    stream = int(torch.cuda.current_stream().cuda_stream)
    driver.launch(launch, _pointers(inputs), _pointers(outputs), stream)


def execute(work: Work, inputs: Tensors, tile: Tile, gpu: Gpu) -> tuple[torch.Tensor, ...]:
    """The outputs on copies of what the call changes; a `checks.Execute` for one GPU."""
    own = copies(work, inputs)
    outputs = outputs_for(work, own)
    by_driver(plan(work, own, gpu, tile), own, outputs)
    torch.cuda.synchronize()
    return outputs


def ptx_equals_triton(work: Work, inputs: Tensors, tile: Tile, gpu: Gpu) -> bool:
    """Whether the PTX without Triton's scratch parameters, launched with exactly TensorRT's arguments, gives the bits
    of Triton's own launch; every output counts, of rows that nobody writes the zeros from before.
    """
    first, second = copies(work, inputs), copies(work, inputs)
    by_ptx, by_triton = outputs_for(work, first), outputs_for(work, second)
    launch = plan(work, first, gpu, tile)
    ptx = plugin_ptx(launch.compiled, len(inputs) + len(launch.extras) + len(by_ptx))
    stream = int(torch.cuda.current_stream().cuda_stream)
    driver.launch_ptx(launch, ptx, _pointers(first), _pointers(by_ptx), stream)
    run_kernel.launch(find_kernel(work.operator), second, by_triton, binding_of(work), gpu, tile)
    torch.cuda.synchronize()
    return all(_same_bits(a, b) for a, b in zip(by_ptx, by_triton, strict=True))


def copies(work: Work, inputs: Tensors) -> list[torch.Tensor]:
    """The inputs, with copies of those that the call changes."""
    changed = set(work.operator.aliases.values())
    return [
        tensor.clone() if port.name in changed else tensor
        for port, tensor in zip(work.operator.inputs, inputs, strict=True)
    ]


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def _pointers(tensors: Tensors) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
