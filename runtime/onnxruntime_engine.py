"""Runs a bundle's CPU engine on ONNX Runtime: weights mapped from their files, the KV pool updated in place."""

from collections.abc import Sequence

import numpy as np
import onnxruntime

from angelforge.bundle import Bundle
from angelforge.config import ModelConfig
from angelforge.engines.cpu import open_engine
from angelforge.engines.onnxruntime_graph import ONNXRUNTIME_ERRORS, session_options
from angelforge.errors import AngelForgeError
from angelforge.precision import Precision
from angelforge.runtime.batch import Batch, Float32

INPUTS = (
    "input_ids",
    "positions",
    "num_tokens",
    "query_start",
    "kv_length",
    "page_table",
    "slots",
    "logit_indices",
)


class OnnxRuntimeEngine:
    """One session and its KV pool.

    The pool of each layer is f32 [num_pages, 2, kv_heads, page_size, head_dim], bound as input and output at once, so
    that a step writes only its own tokens.
    """

    def __init__(self, bundle: Bundle, num_pages: int, threads: int = 0) -> None:
        """Raises AngelForgeError where bundle and engine do not fit each other or cannot be loaded."""
        bundle.require_weights()
        self.config: ModelConfig = bundle.manifest.model
        self.page_size = bundle.manifest.page_size
        self.max_context = bundle.manifest.max_context
        self.num_pages = num_pages
        options = session_options(bundle.folder, threads)
        options.graph_optimization_level = (
            onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # the build did it
            if bundle.manifest.precision is Precision.FP32
            else onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # widens bf16 weights once, at load
        )
        try:
            self._session = onnxruntime.InferenceSession(
                open_engine(bundle), options, providers=["CPUExecutionProvider"]
            )
        except ONNXRUNTIME_ERRORS as error:
            raise AngelForgeError(f"ONNX Runtime {onnxruntime.__version__} cannot load the engine: {error}") from error
        shape = (num_pages, 2, self.config.num_key_value_heads, self.page_size, self.config.head_dim)
        self._pools = [np.zeros(shape, np.float32) for _ in range(self.config.num_hidden_layers)]
        self._binding = self._session.io_binding()
        self._held = [onnxruntime.OrtValue.ortvalue_from_numpy(pool) for pool in self._pools]
        for index, value in enumerate(self._held):
            self._binding.bind_ortvalue_input(f"kv_cache.{index}", value)
            self._binding.bind_ortvalue_output(f"kv_cache_out.{index}", value)

    @property
    def pools(self) -> Sequence[Float32]:
        """The KV pool of each layer, live: f32 [num_pages, 2, kv_heads, page_size, head_dim]."""
        return self._pools

    def forward(self, batch: Batch) -> Float32:
        """Runs one packed call and returns logits f32 [R, vocab].

        Raises:
            AngelForgeError: ONNX Runtime fails, for instance for want of memory; the pool may then hold part of the
                step's keys and values, at positions that a repeated call writes again.
        """
        for name in INPUTS:
            self._binding.bind_cpu_input(name, getattr(batch, name))
        self._binding.bind_output("logits", "cpu")
        try:
            self._session.run_with_iobinding(self._binding)
        except ONNXRUNTIME_ERRORS as error:
            raise AngelForgeError(f"ONNX Runtime failed in a step: {error}") from error
        logits: Float32 = self._binding.get_outputs()[-1].numpy()
        return logits

    def close(self) -> None:
        """Gives session and pool back."""
        del self._binding, self._session, self._held
        self._pools = []
