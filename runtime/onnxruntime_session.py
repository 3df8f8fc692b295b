"""One ONNX Runtime session with its KV pool: weights mapped from their files, the pool updated in place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from angelforge.bundle import Bundle
from angelforge.engines.onnxruntime_graph import ONNXRUNTIME_ERRORS, session_options
from angelforge.errors import AngelForgeError
from angelforge.precision import Precision
from angelforge.runtime.batch import INPUTS, Batch, Float32
from angelforge.runtime.onnxruntime_device import CPU_DEVICE, OrtDevice, open_session


def load_session(
    bundle: Bundle, graph: bytes, threads: int, device: OrtDevice = CPU_DEVICE
) -> onnxruntime.InferenceSession:
    """A session for a graph that a build has optimised; raises AngelForgeError where ONNX Runtime cannot load it."""
    options = session_options(bundle.folder, threads)
    if device.name != "cpu":  # weights get what they need, not a part of an arena that grows with them
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.graph_optimization_level = (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # the build did it
        if bundle.manifest.precision is Precision.FP32
        else onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # widens bf16 weights once, at load
    )
    return open_session(graph, options, device.providers)


class PooledSession:
    """A loaded graph and its pool.

    The pool of each layer is f32 [num_pages, 2, kv_heads, page_size, head_dim] on the device, bound as input and output
    at once, so that a step writes only its own tokens.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: bytes,
        outputs: Sequence[str],
        layers: int,
        pool_shape: tuple[int, ...],
        threads: int,
        device: OrtDevice = CPU_DEVICE,
        kept: Collection[str] = (),
    ) -> None:
        """The outputs in `kept` stay on the device, the others come to the host.

        Raises AngelForgeError where ONNX Runtime cannot load the graph, or the device has no memory for the pool.
        """
        self._session = load_session(bundle, engine, threads, device)
        self._device = device
        self._outputs = {name: device.name if name in kept else "cpu" for name in outputs}
        self._binding = self._session.io_binding()
        self._arrays: list[Float32] = []  # the pools themselves where the host has them
        self._held: list[Any] = []
        for _ in range(layers):
            array = np.zeros(pool_shape, np.float32)
            self._held.append(self.place(array))
            if device.name == "cpu":
                self._arrays.append(array)
        for index, value in enumerate(self._held):
            self._binding.bind_ortvalue_input(f"kv_cache.{index}", value)
            self._binding.bind_ortvalue_output(f"kv_cache_out.{index}", value)

    @property
    def pools(self) -> Sequence[Float32]:
        """The pools: live on a CPU, of a GPU copies that cannot be written."""
        return self._arrays or [_read_only(value.numpy()) for value in self._held]

    def place(self, array: Any) -> Any:
        """An OrtValue of `array` on the device; on a CPU it is the array's own memory.

        Raises:
            AngelForgeError: the device has not so much memory.
        """
        try:
            return onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device.name, 0)
        except ONNXRUNTIME_ERRORS as error:
            raise AngelForgeError(
                f"ONNX Runtime cannot place {array.nbytes / 1e6:.1f} MB on {self._device.name}: {error}. Where memory "
                "is short, give the KV cache less (--kv-memory-gb)."
            ) from error

    def run(self, batch: Batch, more: Mapping[str, Any] | None = None) -> list[Any]:
        """Runs one packed call and returns the OrtValues of its outputs; `more` are OrtValues of further inputs.

        Raises:
            AngelForgeError: ONNX Runtime fails, for instance for want of memory; the pool may then hold part of the
                step's keys and values, at positions that a repeated call writes again.
        """
        for name in INPUTS:
            self._binding.bind_cpu_input(name, getattr(batch, name))
        for name, value in (more or {}).items():
            self._binding.bind_ortvalue_input(name, value)
        for name, device in self._outputs.items():
            self._binding.bind_output(name, device)
        try:
            self._binding.synchronize_inputs()
            self._session.run_with_iobinding(self._binding)
        except ONNXRUNTIME_ERRORS as error:
            raise AngelForgeError(f"ONNX Runtime failed in a step: {error}") from error
        values: list[Any] = self._binding.get_outputs()
        return values[-len(self._outputs) :]

    def close(self) -> None:
        """Gives session and pool back."""
        del self._binding, self._session, self._held
        self._arrays = []


def _read_only(array: Float32) -> Float32:
    array.flags.writeable = False
    return array
