"""Runs a TensorRT engine once, on arrays: for checks of a machine and of an engine, not for serving."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from angelforge.engines.tensorrt_runtime import make_runtime
from angelforge.errors import AngelForgeError
from angelforge.plugins.tensorrt.library import Library
from angelforge.plugins.tensorrt.memory import gpu_memory

Array = np.ndarray[Any, Any]


def run_once(
    library: Library,
    plan: bytes,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Array],
    in_place: Mapping[str, str],
    profile: int = 0,
) -> None:
    """Runs the serialized engine `plan` on `inputs`, by the engine's names, and fills `outputs`.

    `in_place` names outputs that share an input's memory, and that input. Outputs give shape and type, and are
    contiguous. Plugins in Python must be registered before.

    Raises:
        AngelForgeError: TensorRT or CUDA refuses; the message says at which step.
    """
    with gpu_memory() as memory:
        runtime = make_runtime(library)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise AngelForgeError(f"{library.title} cannot load the engine; build it again on this machine.")
        context = engine.create_execution_context(library.api.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise AngelForgeError(f"{library.title} cannot make an execution context: is there enough GPU memory?")
        _require(context.set_optimization_profile_async(profile, memory.stream), f"profile {profile}")
        activations = int(engine.device_memory_size_v2)
        context.set_device_memory(memory.zeros(activations), activations)
        addresses = {name: memory.upload(array) for name, array in inputs.items()}
        for name, array in inputs.items():
            _require(context.set_input_shape(name, tuple(array.shape)), f"the shape {array.shape} of {name}")
        for name, array in outputs.items():
            source = in_place.get(name)
            addresses[name] = memory.zeros(array.nbytes) if source is None else addresses[source]
        for name, address in addresses.items():
            _require(context.set_tensor_address(name, address), f"the address of {name}")
        _require(context.execute_async_v3(memory.stream), "the step; see the messages above")
        for name, array in outputs.items():
            memory.download(addresses[name], array)
        del context, engine, runtime  # before the memory that they use


def _require(accepted: bool, what: str) -> None:
    if not accepted:
        raise AngelForgeError(f"TensorRT refuses {what}.")
