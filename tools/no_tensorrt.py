"""TensorRT's calls around an engine that computes nothing: what the runtime does around them is timed, not they.

On a GPU a step puts as many small kernels on the stream as one of the model has, so that launching the captured step
costs what it will cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch

from angelforge.plugins.tensorrt.library import Library

KERNELS = 330  # launches of a decoding step: about ten a layer


class _Context:
    """Takes what it is told."""

    def __init__(self, device: torch.device, kernels: int) -> None:
        self._scratch = torch.zeros(32, device=device)
        self._kernels = kernels if device.type == "cuda" else 0

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        """Nothing is computed in it."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        for _ in range(self._kernels):
            self._scratch.add_(1.0)
        return True


class _Engine:
    """Tensors by name alone."""

    def __init__(self, names: Sequence[str], device: torch.device, kernels: int) -> None:
        self._names, self._device, self._kernels = names, device, kernels
        self.num_io_tensors = len(names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def create_execution_context(self, strategy: object) -> _Context:
        return _Context(self._device, self._kernels)


def empty_library(names: Sequence[str], device: torch.device, kernels: int = KERNELS) -> Library:
    """A library whose engines have these tensors, and on a GPU launch so many kernels in a step."""

    class Logger:
        def __init__(self) -> None:
            """As TensorRT's, which its users inherit from."""

    class Runtime:
        def __init__(self, logger: object) -> None:
            """Nothing is logged."""

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> _Engine:
            return _Engine(names, device, kernels)

    class Api:
        """What a session asks of TensorRT's module."""

        ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=0)

    return Library("tensorrt", type("EmptyApi", (Api,), {"ILogger": Logger, "Runtime": Runtime}), "11.4.0")
