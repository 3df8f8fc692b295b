"""How many pages the KV cache gets with ONNX Runtime."""

from __future__ import annotations

import os

from angelforge.config import ModelConfig
from angelforge.draft_config import DraftConfig
from angelforge.dtypes import DType
from angelforge.engines.footprint import draft_kv_bytes_per_token, kv_bytes_per_token
from angelforge.errors import AngelForgeError, UsageError
from angelforge.machine import memory

_SHARE = 4  # the cache takes at most this part of the free memory unless told otherwise
_LARGEST_SLOT = 2**31 - 1  # a slot number is an int32


def pool_pages(
    config: ModelConfig,
    page_size: int,
    max_context: int,
    max_batch: int,
    kv_memory: int | None = None,
    draft: DraftConfig | None = None,
    free: int | None = None,
) -> int:
    """Pages of a pool in f32, page 0 included: what `max_batch` sequences of `max_context` need, within the memory.

    The memory is `kv_memory` bytes, or a quarter of what is `free`, by default on this machine; a `draft` has as many
    pages of its own in it. Raises UsageError if that many bytes hold no page, AngelForgeError if the free memory does
    not.
    """
    page_bytes = kv_bytes_per_token(config, DType.F32) * page_size
    if draft is not None:
        page_bytes += draft_kv_bytes_per_token(draft, DType.F32) * page_size
    budget = kv_memory if kv_memory is not None else (free_memory() if free is None else free) // _SHARE
    fitting = budget // page_bytes
    if fitting < 2:
        found = f"{budget / 1e6:.1f} MB for the KV cache hold {fitting} pages of {page_bytes / 1e6:.1f} MB"
        if kv_memory is not None:
            raise UsageError(f"{found}, but at least 2 are needed (page 0 is spare). Give it more memory.")
        raise AngelForgeError(f"{found}, but at least 2 are needed (page 0 is spare). Free memory on this machine.")
    return min(fitting, max_batch * -(-max_context // page_size) + 1, _LARGEST_SLOT // page_size)


def free_memory() -> int:
    """Bytes that this process can still take; half of what is built in where the system does not tell."""
    found = memory()
    return found.available if found is not None else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
