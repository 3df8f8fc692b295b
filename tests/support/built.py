"""Small bundles, from checkpoint to built CPU engine, and packed calls by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from angelforge.bundle import Bundle
from angelforge.engines.cpu import build_cpu
from angelforge.exporter.export import ExportOptions, export
from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.runtime.batch import Batch, Float32
from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine


def make_bundle(
    folder: Path, overrides: dict[str, Any] | None = None, options: ExportOptions | None = None, dtype: str = "F32"
) -> tuple[Path, Bundle]:
    """A random checkpoint with these config keys, exported and built: (checkpoint folder, bundle)."""
    checkpoint = write_checkpoint(folder / "checkpoint", small_config(**(overrides or {})), dtype=dtype)
    bundle = export(str(checkpoint), folder / "bundle", options or ExportOptions())
    build_cpu(bundle)
    return checkpoint, bundle


class Sequences:
    """Sequences in an engine's pool, called by hand: every call packs some new tokens of some sequences."""

    def __init__(self, engine: OnnxRuntimeEngine, pages: Sequence[Sequence[int]]) -> None:
        self.engine = engine
        self.table = np.array(pages, np.int32)  # [B, P]
        self.lengths = [0] * len(pages)

    def call(self, tokens: Sequence[Sequence[int]], padding: int = 0, empty: int = 0) -> list[Float32]:
        """Logits of all new tokens of each sequence; with padding rows and empty sequences behind them."""
        size = self.engine.page_size
        ids = [np.array(each, np.int64) for each in tokens]
        places = [np.arange(n, n + len(each)) for n, each in zip(self.lengths, ids, strict=True)]
        slots = [self.table[b][at // size] * size + at % size for b, at in enumerate(places)]
        count = sum(map(len, ids))
        self.lengths = [n + len(each) for n, each in zip(self.lengths, ids, strict=True)]
        starts = np.cumsum([0, *map(len, ids)])
        # A sequence that has no tokens in this call is an empty one.
        lengths = [n if len(each) else 0 for n, each in zip(self.lengths, ids, strict=True)]
        garbage = np.full(padding, 3)
        logits = self.engine.forward(
            Batch(
                input_ids=np.concatenate([*ids, garbage]).astype(np.int64),
                positions=np.concatenate([*places, garbage]).astype(np.int32),
                num_tokens=np.array([count], np.int32),
                query_start=np.concatenate([starts, np.full(empty, count)]).astype(np.int32),
                kv_length=np.array([*lengths, *[0] * empty], np.int32),
                page_table=np.concatenate([self.table, np.zeros((empty, self.table.shape[1]), np.int32)]),
                slots=np.concatenate([*slots, garbage]).astype(np.int32),
                logit_indices=np.arange(count),
            )
        )
        return np.split(logits.copy(), starts[1:-1])


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest expected magnitude."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
