"""The interface of an engine, and how a bundle's engine for a target is loaded."""

from __future__ import annotations

from typing import Protocol

from angelforge.config import ModelConfig
from angelforge.runtime.batch import Batch, Float32


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
