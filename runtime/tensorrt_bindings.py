"""The tensors of a TensorRT engine, sorted by what they are, and the address of every one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from angelforge.dtypes import DType
from angelforge.errors import AngelForgeError
from angelforge.plugins.tensorrt.types import from_tensorrt
from angelforge.runtime.batch import INPUTS
from angelforge.runtime.device import ALIGNMENT
from angelforge.runtime.weight_layout import Wanted

_POOL, _POOL_OUT = "kv_cache.", "kv_cache_out."


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine; −1 where a size is dynamic."""

    name: str
    is_input: bool
    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Bindings:
    """The tensors of one engine by what they are."""

    pools: tuple[Tensor, ...]  # kv_cache.0, kv_cache.1, …: [pages, 2, kv_heads, page_size, head_dim]
    weights: Mapping[str, Wanted]
    outputs: Mapping[str, Tensor]  # without those that are the pools' memory

    @property
    def page_bytes(self) -> int:
        """Of one page in all layers."""
        return sum(_page_bytes(pool) for pool in self.pools)

    def pool_addresses(self, begin: int, pages: int) -> dict[str, int]:
        """Inputs and outputs of the pool in one stretch of memory from `begin`."""
        found = {}
        for index, pool in enumerate(self.pools):
            found[f"{_POOL}{index}"] = found[f"{_POOL_OUT}{index}"] = begin
            begin += pool_bytes(pool, pages)
        return found


def read_bindings(api: Any, engine: Any, extra_inputs: Sequence[str], outputs: Sequence[str]) -> Bindings:
    """Sorts the tensors of an ICudaEngine with the contract's inputs, `extra_inputs` and `outputs`.

    Raises AngelForgeError if it lacks one of them.
    """
    tensors = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name) == api.TensorIOMode.INPUT
        onnx_type = from_tensorrt(api, engine.get_tensor_dtype(name))
        dtype = next(dtype for dtype in DType if dtype.onnx == onnx_type.value)
        tensors.append(Tensor(name, is_input, dtype, tuple(engine.get_tensor_shape(name))))
    return sort_tensors(tensors, extra_inputs, outputs)


def sort_tensors(tensors: Sequence[Tensor], extra_inputs: Sequence[str], outputs: Sequence[str]) -> Bindings:
    """The same for tensors that have been read."""
    inputs = {tensor.name: tensor for tensor in tensors if tensor.is_input}
    results = {tensor.name: tensor for tensor in tensors if not tensor.is_input}
    layers = sum(name.startswith(_POOL) for name in inputs)
    needed = [*INPUTS, *extra_inputs, *(f"{_POOL}{i}" for i in range(max(layers, 1)))]
    missing = [name for name in needed if name not in inputs]
    missing += [name for name in (*outputs, *(f"{_POOL_OUT}{i}" for i in range(layers))) if name not in results]
    if missing:
        raise AngelForgeError(
            f"The engine has no {', '.join(missing)}: it was built from another kind of graph. Build it again."
        )
    named = set(needed)
    return Bindings(
        pools=tuple(inputs[f"{_POOL}{i}"] for i in range(layers)),
        weights={name: Wanted(t.dtype, t.shape) for name, t in inputs.items() if name not in named},
        outputs={name: tensor for name, tensor in results.items() if not name.startswith(_POOL_OUT)},
    )


def pool_bytes(pool: Tensor, pages: int) -> int:
    """Of one layer's pool of so many pages, rounded up so that the next begins aligned."""
    return -(-pages * _page_bytes(pool) // ALIGNMENT) * ALIGNMENT


def check_addresses(names: Sequence[str], addresses: Mapping[str, int]) -> None:
    """Raises AngelForgeError if a tensor has no address, or one that TensorRT would not take."""
    wrong = [name for name in names if addresses.get(name, 1) % ALIGNMENT]
    if wrong:
        raise AngelForgeError(f"{len(wrong)} tensors have no usable address, first {wrong[0]}; please report this.")


def _page_bytes(pool: Tensor) -> int:
    size = pool.dtype.itemsize
    for dim in pool.shape[1:]:
        size *= dim
    return size
