"""Runs kernels in Triton's interpreter: with the product's exact numbers (`interpreted.py`), on checked memory."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import torch
from triton.runtime import interpreter

from angelforge.plugins.device.interpreted import NUMPY_TYPES, dot, exact_numbers
from angelforge.plugins.device.interpreted import convert_float as convert_float
from angelforge.plugins.kernel import Gpu, Kernel, Tile
from angelforge.plugins.run_kernel import allocate, bind_tensors, launch

H20 = Gpu("sm_90", 78)
FEW_SMS = Gpu("sm_90", 3)  # persistent kernels take several turns even on small shapes


def ordered_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """`dot` that adds one product after another: its result does not depend on the tile's shape, as NumPy's may."""
    left, right = (
        np.asarray(x.data).view(NUMPY_TYPES.get(x.dtype.scalar, x.data.dtype)).astype(d.data.dtype) for x in (a, b)
    )
    total = d.data.copy()
    for k in range(left.shape[-1]):
        total += left[..., k, None] * right[..., k, None, :]
    return interpreter.TensorHandle(total, d.dtype.scalar)


class OutOfBoundsError(AssertionError):
    """A kernel touched memory that is not its own."""


def _check(pointers: Any, mask: np.ndarray, regions: Sequence[tuple[int, int]], what: str) -> None:
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    addresses, active = np.broadcast_arrays(pointers.data, np.asarray(mask) != 0)  # masks may be integers
    used = addresses[active].astype(np.uint64)
    inside = np.zeros(used.shape, bool)
    for start, end in regions:
        inside |= (used >= start) & (used + size <= end)
    if not inside.all():
        raise OutOfBoundsError(f"{what} of {int((~inside).sum())} elements outside every tensor")


def _check_unread(pointers: Any, mask: np.ndarray, regions: Sequence[tuple[int, int]]) -> None:
    addresses, active = np.broadcast_arrays(pointers.data, np.asarray(mask) != 0)
    used = addresses[active].astype(np.uint64)
    if any(bool(((used >= start) & (used < end)).any()) for start, end in regions):
        raise OutOfBoundsError("read of what this call does not need")


@contextmanager
def one_program(index: int, count: int) -> Iterator[None]:
    """Within it, each launch runs program `index` of a grid of `count`, as often as the launch has programs."""
    builder = interpreter.InterpreterBuilder

    def set_grid_dim(self: Any, *_: int) -> None:
        self.grid_dim = (count, 1, 1)

    def set_grid_idx(self: Any, *_: int) -> None:
        self.grid_idx = (index, 0, 0)

    with (
        mock.patch.object(builder, "set_grid_dim", set_grid_dim),
        mock.patch.object(builder, "set_grid_idx", set_grid_idx),
    ):
        yield


@contextmanager
def exact_interpreter(
    readable: Sequence[torch.Tensor],
    writable: Sequence[torch.Tensor],
    ordered: bool = False,
    unread: Sequence[torch.Tensor] = (),
) -> Iterator[None]:
    """Within it, conversions are exact, and a kernel may touch these tensors only (raises OutOfBoundsError).

    `unread`, contiguous parts of them, may not even be read. With `ordered`, matmuls add one product after another.
    """

    def regions(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
        return [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]

    read, write, untouched = regions([*readable, *writable]), regions(writable), regions(unread)
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        _check(pointers, mask.data, read, "read")
        _check_unread(pointers, mask.data, untouched)
        return load(self, pointers, mask, *rest, **named)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        _check(pointers, mask.data, write, "write")
        return store(self, pointers, value, mask, *rest, **named)

    with (
        exact_numbers(ordered_dot if ordered else dot),
        mock.patch.object(builder, "create_masked_load", checked_load),
        mock.patch.object(builder, "create_masked_store", checked_store),
    ):
        yield


def run_interpreted(
    kernel: Kernel,
    inputs: Sequence[torch.Tensor],
    attributes: Mapping[str, int | float],
    *,
    gpu: Gpu = H20,
    tile: Tile | None = None,
    profile_tokens: int | None = None,
    ordered: bool = False,
    unread: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, ...]:
    """`run_kernel.run` on CPU tensors, every access checked; outputs start as NaN (−1 for integers).

    `unread` are parts of the inputs that the kernel may not even read.
    """
    binding = bind_tensors(kernel, inputs, attributes)
    outputs = allocate(kernel, inputs, binding)
    aliased = kernel.operator.aliases
    for port, tensor in zip(kernel.operator.outputs, outputs, strict=True):
        if port.name not in aliased:
            tensor.view(torch.uint8).fill_(0xFF)
    if tile is None:
        tile = kernel.tile(binding.dims, binding.dims.get("T", 1) if profile_tokens is None else profile_tokens)
    with exact_interpreter(inputs, outputs, ordered, unread):
        launch(kernel, inputs, outputs, binding, gpu, tile)
    return outputs


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A tensor with the array's values and type, bf16 and FP8 included; memory is not shared."""
    special = {np.dtype(ml_dtypes.bfloat16): torch.bfloat16, np.dtype(ml_dtypes.float8_e4m3fn): torch.float8_e4m3fn}
    array = np.array(array, order="C")
    if array.dtype not in special:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(f"i{array.itemsize}" if array.itemsize > 1 else "u1")).view(special[array.dtype])


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """An array with the tensor's values and type, as ml_dtypes for bf16 and FP8."""
    special: dict[torch.dtype, tuple[torch.dtype, Any]] = {
        torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
        torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    }
    if tensor.dtype not in special:
        return tensor.numpy()
    bits, dtype = special[tensor.dtype]
    return tensor.view(bits).numpy().view(dtype)
