"""The engine of several ranks on the CPUs of one machine: each rank holds its part of the model, and of the pool."""

from __future__ import annotations

from dataclasses import replace

from angelforge.bundle import Bundle
from angelforge.machine import cores
from angelforge.ranks import rank_config
from angelforge.runtime.engines import Engine
from angelforge.runtime.group import Group
from angelforge.runtime.memory import pool_pages
from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine
from angelforge.runtime.ranked_engine import RankedEngine, follow


def load_ranked(
    bundle: Bundle,
    group: Group,
    num_pages: int | None,
    kv_memory: int | None,
    max_batch: int,
    threads: int | None,
    draft: bool,
) -> Engine:
    """As `load_engine` with a group: the engine on rank 0; no other rank returns. Ranks share cores and memory."""
    manifest, ranks = bundle.manifest, group.ranks
    part = rank_config(manifest.model, manifest.precision, ranks)
    each = threads or max(cores() // ranks, 1)

    def load(pages: int) -> Engine:
        return OnnxRuntimeEngine(bundle, pages, each, group)

    def choose_pages() -> int:
        if num_pages is not None:
            return num_pages
        all_heads = replace(manifest.model, num_key_value_heads=part.num_key_value_heads * ranks)
        drafted = manifest.draft if draft else None
        return pool_pages(all_heads, manifest.page_size, manifest.max_context, max_batch, kv_memory, drafted)

    if group.rank > 0:
        follow(load, group)
    return RankedEngine(load, choose_pages, group)
