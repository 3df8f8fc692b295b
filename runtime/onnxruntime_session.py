"""One ONNX Runtime session on a CPU with its KV pool: weights mapped from their files, the pool updated in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from angelforge.bundle import Bundle
from angelforge.engines.onnxruntime_graph import ONNXRUNTIME_ERRORS, session_options
from angelforge.errors import AngelForgeError
from angelforge.precision import Precision
from angelforge.runtime.batch import INPUTS, Batch, Float32


def load_session(bundle: Bundle, graph: bytes, threads: int) -> onnxruntime.InferenceSession:
    """A session for a graph that a build has optimised; raises AngelForgeError where ONNX Runtime cannot load it."""
    options = session_options(bundle.folder, threads)
    options.graph_optimization_level = (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # the build did it
        if bundle.manifest.precision is Precision.FP32
        else onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # widens bf16 weights once, at load
    )
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except ONNXRUNTIME_ERRORS as error:
        raise AngelForgeError(f"ONNX Runtime {onnxruntime.__version__} cannot load the engine: {error}") from error


class PooledSession:
    """A loaded graph and its pool.

    The pool of each layer is f32 [num_pages, 2, kv_heads, page_size, head_dim], bound as input and output at once, so
    that a step writes only its own tokens.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: bytes,
        outputs: Sequence[str],
        layers: int,
        pool_shape: tuple[int, ...],
        threads: int,
    ) -> None:
        """Raises AngelForgeError where ONNX Runtime cannot load the graph."""
        self._session = load_session(bundle, engine, threads)
        self.pools: list[Float32] = [np.zeros(pool_shape, np.float32) for _ in range(layers)]
        self._outputs = tuple(outputs)
        self._binding = self._session.io_binding()
        self._held = [onnxruntime.OrtValue.ortvalue_from_numpy(pool) for pool in self.pools]
        for index, value in enumerate(self._held):
            self._binding.bind_ortvalue_input(f"kv_cache.{index}", value)
            self._binding.bind_ortvalue_output(f"kv_cache_out.{index}", value)

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
        for name in self._outputs:
            self._binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(self._binding)
        except ONNXRUNTIME_ERRORS as error:
            raise AngelForgeError(f"ONNX Runtime failed in a step: {error}") from error
        values: list[Any] = self._binding.get_outputs()
        return values[-len(self._outputs) :]

    def close(self) -> None:
        """Gives session and pool back."""
        del self._binding, self._session, self._held
        self.pools = []
