"""How many pages the KV cache gets on a CPU."""

from __future__ import annotations

import os
from pathlib import Path

from angelforge.config import ModelConfig
from angelforge.dtypes import DType
from angelforge.engines.footprint import kv_bytes_per_token
from angelforge.errors import AngelForgeError, UsageError

_SHARE = 4  # the cache takes at most this part of the free memory unless told otherwise
_LARGEST_SLOT = 2**31 - 1  # a slot number is an int32
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def cpu_pages(
    config: ModelConfig, page_size: int, max_context: int, max_batch: int, kv_memory: int | None = None
) -> int:
    """Pages of a pool in f32, page 0 included: what `max_batch` sequences of `max_context` need, within the memory.

    The memory is `kv_memory` bytes, or a quarter of what is free. Raises UsageError if that many bytes hold no page,
    AngelForgeError if the free memory does not.
    """
    page_bytes = kv_bytes_per_token(config, DType.F32) * page_size
    memory = kv_memory if kv_memory is not None else free_memory() // _SHARE
    fitting = memory // page_bytes
    if fitting < 2:
        found = f"{memory / 1e6:.1f} MB for the KV cache hold {fitting} pages of {page_bytes / 1e6:.1f} MB"
        if kv_memory is not None:
            raise UsageError(f"{found}, but at least 2 are needed (page 0 is spare). Give it more memory.")
        raise AngelForgeError(f"{found}, but at least 2 are needed (page 0 is spare). Free memory on this machine.")
    return min(fitting, max_batch * -(-max_context // page_size) + 1, _LARGEST_SLOT // page_size)


def free_memory() -> int:
    """Bytes that this process can still take: of the machine, and of its control group where that sets a limit."""
    free = _machine_memory()
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no control group of this kind, or "max": no limit
        return free
    return max(0, min(free, limit - used))


def _machine_memory() -> int:
    try:
        rows = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024  # kB
    except (OSError, KeyError, ValueError):  # not Linux: half of what is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
