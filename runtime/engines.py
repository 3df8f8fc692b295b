"""The interface of an engine, and how a bundle's engine for a target is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from angelforge.bundle import Bundle
from angelforge.config import ModelConfig
from angelforge.runtime.batch import Batch, Int64
from angelforge.runtime.memory import pool_pages
from angelforge.targets import get_target

if TYPE_CHECKING:
    from angelforge.runtime.group import Group


class Engine(Protocol):
    """A compiled model with its weights and KV pool, ready to run packed calls."""

    config: ModelConfig
    page_size: int  # tokens a page
    num_pages: int  # of the pool, page 0 included
    max_context: int  # positions of one sequence

    def forward(self, batch: Batch) -> Any:
        """Logits f32 [R, vocab] of the rows `batch.logit_indices`; valid until the next call.

        A NumPy array, or a torch.Tensor on the engine's device. Writes the keys and values of all rows to the pool.
        Raises AngelForgeError if the engine fails.
        """

    def close(self) -> None:
        """Frees memory and device; the engine cannot be used after."""


class DraftEngine(Protocol):
    """A draft beside a target's engine, with a KV pool of its own. States stay where the engines are."""

    page_size: int  # tokens a page, as in the target's pool
    num_pages: int  # of its pool, page 0 included; at least as many as the target has
    max_depth: int  # proposals a request that the engines take
    vocabulary: Int64  # [draft vocabulary] the target's id of each draft token

    def follow(self, batch: Batch, rows: Int64) -> Int64:
        """One step on the states that the target's last call computed in its rows `rows` int64 [T].

        `batch.input_ids` are the tokens after those of the rows. Returns the likeliest next tokens, ids of the target,
        int64 [R]. Raises AngelForgeError if the engine fails.
        """

    def extend(self, batch: Batch) -> Int64:
        """The same on the first T states of those that this draft's last call handed on (one for each of its R)."""

    def logits(self) -> Any:
        """Logits f32 [R, draft vocabulary] of the last call, as `Engine.forward` gives them; valid until the next."""

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
    draft: bool = False,
    group: Group | None = None,
    cuda_graphs: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Engine:
    """Loads the engine that was built for `target` into a bundle.

    The pool has `num_pages` pages, or what `kv_memory` bytes hold, with `draft` shared with the pool of the bundle's
    draft; by default what `pool_pages` gives, or with TensorRT what is left. `threads` is for CPUs; by default all.
    With a `group` it is the engine of all ranks; on every rank but the first this does not return: it works for the
    first one until that closes its engine, and then ends the process. `cuda_graphs` and `progress` (bytes done and in
    all while weights are loaded) are for GPUs. Raises AngelForgeError if the engine is missing, damaged or unfit.
    """
    found = get_target(target)
    if found.backend != "onnxruntime":
        from angelforge.runtime.tensorrt_loading import Wish, load_tensorrt

        wish = Wish(num_pages, kv_memory, max_batch, draft, cuda_graphs, progress)
        if group is not None:
            from angelforge.runtime.tensorrt_ranks import load_ranked_tensorrt

            return load_ranked_tensorrt(bundle, found, wish, group)
        return load_tensorrt(bundle, found, wish)

    from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine

    if group is not None:
        from angelforge.runtime.onnxruntime_ranks import load_ranked

        return load_ranked(bundle, group, num_pages, kv_memory, max_batch, threads, draft)

    from angelforge.runtime.onnxruntime_device import open_device

    device = open_device(found)
    manifest = bundle.manifest
    if num_pages is None:
        drafted, free = manifest.draft if draft else None, device.memory_bytes
        sizes = (manifest.page_size, manifest.max_context, max_batch)
        num_pages = pool_pages(manifest.model, *sizes, kv_memory, drafted, free)
    return OnnxRuntimeEngine(bundle, num_pages, threads or 0, target=target, device=device)


def load_draft(bundle: Bundle, target: str, engine: Engine, *, threads: int | None = None) -> DraftEngine:
    """Loads the engine of a bundle's draft beside `engine`, the one that `load_engine` gave for the same target.

    Raises AngelForgeError if there is no draft, or its engine is missing, damaged or unfit.
    """
    from angelforge.runtime.ranked_engine import RankedEngine

    found = get_target(target)
    if found.backend != "onnxruntime":
        from angelforge.runtime.tensorrt_engine import TensorRTEngine
        from angelforge.runtime.tensorrt_loading import Rank, load_tensorrt_draft

        if isinstance(engine, RankedEngine):  # the first rank drafts for all
            assert isinstance(engine.local, TensorRTEngine)
            return load_tensorrt_draft(bundle, found, engine.local, Rank(0, engine.group.ranks))
        assert isinstance(engine, TensorRTEngine)
        return load_tensorrt_draft(bundle, found, engine)

    from angelforge.runtime.onnxruntime_draft import OnnxRuntimeDraft
    from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine

    if isinstance(engine, RankedEngine):  # the first rank drafts for all
        assert isinstance(engine.local, OnnxRuntimeEngine)
        return OnnxRuntimeDraft(bundle, engine.local, threads or 0, engine.group.ranks)
    assert isinstance(engine, OnnxRuntimeEngine)
    return OnnxRuntimeDraft(bundle, engine, threads or 0)
