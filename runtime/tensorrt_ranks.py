"""The engine of several ranks on the GPUs of one machine, rank N on GPU N; TensorRT's collectives sum over NCCL."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from angelforge.bundle import Bundle
from angelforge.errors import AngelForgeError
from angelforge.runtime.engines import Engine
from angelforge.runtime.group import LOADING, Group
from angelforge.runtime.ranked_engine import RankedEngine, follow
from angelforge.runtime.sharding import slices
from angelforge.runtime.tensorrt_loading import Rank, Wish, load_tensorrt
from angelforge.targets import Target


def load_ranked_tensorrt(bundle: Bundle, target: Target, wish: Wish, group: Group) -> Engine:
    """As `load_engine` with a group: the engine on rank 0; no other rank returns.

    All ranks load with one wish, the draft's memory included that only rank 0 will use: the steps that they capture,
    and so the sizes that they sum, must be the same.
    """
    manifest = bundle.manifest
    communicator = Communicator(group)
    rank = Rank(
        index=group.rank,
        count=group.ranks,
        slices=slices(manifest.model, manifest.precision, group.rank, group.ranks),
        on_context=communicator.give,
        agree=group.minimum,
    )

    def load(pages: int) -> Engine:
        return load_tensorrt(bundle, target, replace(wish, num_pages=pages or None), rank)

    def settle(engine: Any) -> None:
        group.wait_for(engine.device.mark(engine.stream).query)

    if group.rank > 0:
        wish = replace(wish, report=None)
        follow(load, group, settle)
    return RankedEngine(load, lambda: wish.num_pages or 0, group, settle)


class Communicator:
    """Gives every execution context the NCCL communicator of this rank, which torch makes at its first collective."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._capsule: Any = None

    def give(self, context: Any) -> None:
        """For `TensorrtSession`; all ranks make the same contexts in turn. Raises AngelForgeError if it is refused."""
        if self._capsule is None:
            self._group.barrier(LOADING)  # ranks load at their own pace, and a first collective waits for all
            self._capsule = self._group.communicator()
        self._group.barrier(LOADING)  # the call blocks until all ranks have made it
        if not context.set_communicator(self._capsule):
            raise AngelForgeError("TensorRT refuses the NCCL communicator: torch and TensorRT must load one libnccl.")
