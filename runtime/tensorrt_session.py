"""TensorRT's own calls: a deserialised engine, its execution contexts, one enqueued step. All else is elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from angelforge.engines.tensorrt_errors import explain_run_errors
from angelforge.engines.tensorrt_log import logger_of
from angelforge.engines.tensorrt_runtime import make_runtime
from angelforge.errors import AngelForgeError
from angelforge.plugins.tensorrt.library import Library
from angelforge.runtime.tensorrt_bindings import Bindings, read_bindings


class TensorrtSession:
    """One engine. `on_context` is called with every IExecutionContext that is made, before it is used."""

    def __init__(self, library: Library, plan: bytes, on_context: Callable[[Any], None] | None = None) -> None:
        """Raises AngelForgeError where TensorRT cannot load the engine, with what it said."""
        self.library = library
        self._on_context = on_context
        self._log = logger_of(library)
        self._runtime = make_runtime(library)
        self._engine = self.checked("load the engine", self._runtime.deserialize_cuda_engine, plan)
        self.names: Sequence[str] = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]

    def bindings(self, extra_inputs: Sequence[str], outputs: Sequence[str]) -> Bindings:
        """The engine's tensors; raises AngelForgeError as `read_bindings`."""
        return read_bindings(self.library.api, self._engine, extra_inputs, outputs)

    @property
    def activation_bytes(self) -> int:
        """What the greediest profile needs; steps run one after another, so all contexts share it."""
        count = self._engine.num_optimization_profiles
        return max(int(self._engine.get_device_memory_size_for_profile_v2(i)) for i in range(count))

    def context(
        self,
        profile: int,
        activations: Any,
        shapes: Mapping[str, Sequence[int]],
        addresses: Mapping[str, int],
        stream: int,
    ) -> TensorrtContext:
        """A context for one profile on the buffer `activations` (torch.Tensor uint8).

        `shapes` and `addresses` are those that no step changes: of weights, pool, outputs. Raises AngelForgeError where
        TensorRT refuses one.
        """
        strategy = self.library.api.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.checked("make an execution context", self._engine.create_execution_context, strategy)
        if self._on_context is not None:
            self._on_context(context)
        self.checked(f"use profile {profile}", context.set_optimization_profile_async, profile, stream)
        context.set_device_memory(int(activations.data_ptr()), int(activations.shape[0]))
        made = TensorrtContext(self, context)
        made.place(shapes, {name: addresses[name] for name in self.names if name in addresses})
        return made

    def checked(self, doing: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """What `call` returns; raises AngelForgeError, with TensorRT's own words, for None and False."""
        self._log.run_errors.clear()
        result = call(*arguments)
        if result is None or result is False:
            raise AngelForgeError(explain_run_errors(self.library.title, doing, list(self._log.run_errors)))
        return result

    def close(self) -> None:
        """Gives engine and runtime back, in this order; contexts must have gone before."""
        del self._engine
        del self._runtime


class TensorrtContext:
    """One IExecutionContext with everything bound but what a step changes."""

    def __init__(self, session: TensorrtSession, context: Any) -> None:
        self._session, self._context = session, context

    def place(self, shapes: Mapping[str, Sequence[int]], addresses: Mapping[str, int]) -> None:
        """Sets shapes of inputs and addresses of tensors; raises AngelForgeError where TensorRT refuses one."""
        context, checked = self._context, self._session.checked
        for name, shape in shapes.items():
            checked(f"take {name} of shape {list(shape)}", context.set_input_shape, name, tuple(shape))
        for name, address in addresses.items():
            checked(f"take the memory of {name}", context.set_tensor_address, name, address)

    def run(self, stream: int) -> None:
        """Puts a step on a stream; raises AngelForgeError where TensorRT refuses it."""
        self._session.checked("run a step", self._context.execute_async_v3, stream)
