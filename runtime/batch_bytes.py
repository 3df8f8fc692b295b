"""A `Batch` as bytes, for the ranks that follow the first one: sizes, then the arrays one after another."""

from __future__ import annotations

import numpy as np

from angelforge.runtime.batch import Batch

_TYPES: dict[str, type[np.generic]] = {
    "input_ids": np.int64,
    "logit_indices": np.int64,  # the 8-byte ones first: all arrays are aligned to their items
    "positions": np.int32,
    "num_tokens": np.int32,
    "query_start": np.int32,
    "kv_length": np.int32,
    "page_table": np.int32,
    "slots": np.int32,
}


def encode(batch: Batch) -> bytes:
    """All of a batch: int64 T, R, B, P and the arrays in the order of `_TYPES`."""
    sizes = (batch.input_ids.shape[0], batch.logit_indices.shape[0], *batch.page_table.shape)
    return b"".join([np.array(sizes, np.int64).tobytes(), *(getattr(batch, name).tobytes() for name in _TYPES)])


def decode(data: bytes) -> Batch:
    """The inverse of `encode`; raises AngelForgeError for bytes that are no batch."""
    tokens, rows, sequences, pages = (int(size) for size in np.frombuffer(data, np.int64, 4))
    shapes = {
        "num_tokens": (1,),
        "query_start": (sequences + 1,),
        "kv_length": (sequences,),
        "page_table": (sequences, pages),
        "logit_indices": (rows,),
    }
    arrays, place = {}, 32
    for name, dtype in _TYPES.items():
        shape = shapes.get(name, (tokens,))
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(data, dtype, count, place).reshape(shape)
        place += arrays[name].nbytes
    return Batch(**arrays)
