"""TensorRT's runtime classes over ONNX Runtime: an engine is a graph, device memory is host memory.

What TensorRT would compute from the addresses that it was given is computed here from the same addresses, so that all
that the runtime does around TensorRT's calls can be tried without a GPU. Stricter than TensorRT where a mistake would
go unseen: every address is aligned and set, shapes lie within the profile, aliased tensors have one address, and a
context that has run never gets other shapes, for which TensorRT loads the kernels of plugins again and keeps the old
ones (NVIDIA/TensorRT issue 4849). `tests/engines/test_tensorrt_api.py` compares its methods
with those of the real bindings.
"""

import enum
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import onnxruntime

from angelforge.engines.profiles import Profile
from angelforge.plugins.tensorrt.library import Library

NUMPY = {"FLOAT": np.float32, "INT64": np.int64, "INT32": np.int32}
ACTIVATIONS = 4096  # bytes that a context asks for, plus its profile's index


class DataType(enum.Enum):
    FLOAT, HALF, BF16, FP8, INT32, INT64, INT8, UINT8, BOOL = range(9)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class ILogger:
    def __init__(self) -> None:
        pass


class Severity(enum.Enum):
    ERROR, WARNING = range(2)


class IExecutionContext:
    def __init__(self, engine: "ICudaEngine") -> None:
        self._engine = engine
        self._profile: Profile | None = None
        self._memory = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.runs = 0
        self.changes = 0  # since it was made

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = self._engine.profiles[profile_index]
        self._needed = self._engine.get_device_memory_size_for_profile_v2(profile_index)
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        assert size >= self._needed
        self._memory = memory

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        symbols = self._engine.inputs[name]
        assert len(symbols) == len(shape), name
        assert not self.runs or self.shapes[name] == tuple(shape), f"{name} of a context that has run changes"
        self.changes += 1
        assert self._profile is not None
        ranges = self._profile.symbols()
        for symbol, size in zip(symbols, shape, strict=True):
            if isinstance(symbol, int):
                if symbol != size:
                    return self._refuse(f"{name} has {size} where {symbol} was expected")
            elif not ranges[symbol].least <= size <= ranges[symbol].most:
                return self._refuse(f"{name}: {symbol} = {size} is outside the profile {self._profile.name}")
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory % 256 == 0
        assert name in self._engine.inputs or name in self._engine.outputs
        self.changes += 1
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self._engine
        if engine.fail_with is not None:
            message, engine.fail_with = engine.fail_with, None
            return self._refuse(message)
        assert self._memory
        assert set(self.addresses) == {*engine.inputs, *engine.outputs}
        sizes: dict[str, int] = {}
        binding = engine.session.io_binding()
        for name, symbols in engine.inputs.items():
            shape = self.shapes.get(name, tuple(symbols))
            assert all(isinstance(size, int) for size in shape), f"{name} has no shape"
            for symbol, size in zip(symbols, shape, strict=True):
                if not isinstance(symbol, int):
                    assert sizes.setdefault(symbol, size) == size, f"{symbol} of {name}"
            binding.bind_input(name, "cpu", 0, engine.numpy(name), shape, self.addresses[name])
        for name, symbols in engine.outputs.items():
            shape = tuple(size if isinstance(size, int) else sizes[size] for size in symbols)
            if name.startswith("kv_cache_out."):
                assert self.addresses[name] == self.addresses[name.replace("_out", "")]
            binding.bind_output(name, "cpu", 0, engine.numpy(name), shape, self.addresses[name])
        engine.session.run_with_iobinding(binding)
        self.runs += 1
        engine.ran.append((sizes["T"], sizes["B"]))
        return True

    def _refuse(self, message: str) -> bool:
        self._engine.logger.log(Severity.ERROR, f"Error Code 3: API Usage Error ({message} In f at file.cpp:1)")
        return False


@cache
def _session(plan: bytes) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(plan, providers=["CPUExecutionProvider"])


class ICudaEngine:
    def __init__(self, plan: bytes, profiles: Sequence[Profile], logger: Any) -> None:
        self.logger, self.profiles = logger, profiles
        self.session = _session(plan)
        self._types = {}
        self.inputs, self.outputs = {}, {}
        for kind, values in ((self.inputs, self.session.get_inputs()), (self.outputs, self.session.get_outputs())):
            for value in values:
                kind[value.name] = tuple(value.shape)
                self._types[value.name] = {"tensor(float)": "FLOAT", "tensor(int64)": "INT64"}.get(value.type, "INT32")
        self.contexts: list[IExecutionContext] = []
        self.ran: list[tuple[int, int]] = []  # T and B of all steps
        self.fail_with: str | None = None  # of the next step

    @property
    def num_io_tensors(self) -> int:
        return len(self._types)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self._types)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._types[name]]

    def get_tensor_shape(self, name: str) -> list[int]:
        shape = self.inputs.get(name, self.outputs.get(name, ()))
        return [size if isinstance(size, int) else -1 for size in shape]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return ACTIVATIONS + profile_index

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> IExecutionContext:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self.contexts.append(IExecutionContext(self))
        return self.contexts[-1]

    def numpy(self, name: str) -> Any:
        return NUMPY[self._types[name]]


def make_library(profiles: Sequence[Profile]) -> Library:
    """A TensorRT whose plans are ONNX graphs; its engines are kept in `api.engines`."""

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
            if not serialized_engine:
                self._logger.log(Severity.ERROR, "Error Code 1: Serialization (the plan is empty In f at file.cpp:1)")
                return None
            Api.engines.append(ICudaEngine(serialized_engine, profiles, self._logger))
            return Api.engines[-1]

    class Api:
        engines: ClassVar[list[ICudaEngine]] = []

    for kind in (DataType, TensorIOMode, ExecutionContextAllocationStrategy, ILogger, Runtime):
        setattr(Api, kind.__name__, kind)
    return Library("tensorrt", Api, "11.4.0")


def plan_of(graph: ir.Model) -> bytes:
    """A bundle's graph with its function bodies and with every weight as an input."""
    weights = list(graph.graph.initializers.values())
    graph.graph.initializers.clear()
    for weight in weights:
        weight.const_value = None
        if weight not in graph.graph.inputs:
            graph.graph.inputs.append(weight)
    return ir.to_proto(graph).SerializeToString()
