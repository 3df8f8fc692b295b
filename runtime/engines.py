"""The interface of an engine, and how a bundle's engine for a target is loaded."""

from __future__ import annotations

from typing import Protocol

from angelforge.bundle import Bundle
from angelforge.config import ModelConfig
from angelforge.errors import UsageError
from angelforge.runtime.batch import Batch, Float32
from angelforge.runtime.memory import cpu_pages
from angelforge.targets import get_target


class Engine(Protocol):
    """A compiled model with its weights and KV pool, ready to run packed calls."""

    config: ModelConfig
    page_size: int  # tokens a page
    num_pages: int  # of the pool, page 0 included
    max_context: int  # positions of one sequence

    def forward(self, batch: Batch) -> Float32:
        """Logits f32 [R, vocab] of the rows `batch.logit_indices`; valid until the next call.

        Writes the keys and values of all rows to the pool. Raises AngelForgeError if the engine fails.
        """

    def close(self) -> None:
        """Frees memory and device; the engine cannot be used after."""


def load_engine(
    bundle: Bundle,
    target: str,
    *,
    num_pages: int | None = None,
    kv_memory: int | None = None,
    max_batch: int = 32,
    threads: int | None = None,
) -> Engine:
    """Loads the engine that was built for `target` into a bundle.

    The pool has `num_pages` pages, or what `cpu_pages` gives for `kv_memory` bytes. `threads` is for CPUs; by default
    all cores. Raises AngelForgeError if the engine is missing, damaged or unfit.
    """
    backend = get_target(target).backend
    if backend != "onnxruntime":
        raise UsageError(f"Target {target} needs {backend}, which this version cannot run. Use target cpu.")
    from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine

    manifest = bundle.manifest
    if num_pages is None:
        num_pages = cpu_pages(manifest.model, manifest.page_size, manifest.max_context, max_batch, kv_memory)
    return OnnxRuntimeEngine(bundle, num_pages, threads or 0)
