"""Packs a checkpoint's weights into a bundle: streaming, resumable, with a memory bound that no model size changes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from angelforge.atomic import atomic_file, lock, remove_leftovers
from angelforge.checkpoint import Checkpoint
from angelforge.diskerrors import explained
from angelforge.errors import AngelForgeError
from angelforge.exporter.copying import shard_runs
from angelforge.exporter.journal import Journal, PackedShard, origin_digest
from angelforge.exporter.layout import Shard
from angelforge.exporter.openfiles import OpenFiles
from angelforge.exporter.pack_checks import check_sources, check_space
from angelforge.exporter.pieces import Quantized
from angelforge.exporter.quantizing import FileQuantizer
from angelforge.exporter.shard_writer import Ring, make_ring, write_shard
from angelforge.parallel import run_all

__all__ = ["PackedShard", "pack", "remove_stale"]

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_WORKERS = 4  # more than two processors can do at once: one may wait for the disk while another hashes
_MOST_QUANTIZING = 8  # each takes a processor; more would wait for Python's lock


def pack(
    checkpoint: Checkpoint,
    shards: Sequence[Shard],
    bundle_dir: Path,
    progress: Progress | None = None,
    workers: int | None = None,
    checked: Callable[[], None] = lambda: None,
) -> list[PackedShard]:
    """Writes the weight files `shards` of a bundle from `checkpoint` and returns their records in the same order.

    Each file appears whole or not at all, synced to the disk. A call after an interrupted one keeps the files that are
    finished, unless sources or layout have changed since. `progress` is called in the caller's thread. `workers` files
    are written at a time: unless told otherwise 4, or one for each processor (2 to 8) when weights are quantised. Each
    takes 16 MB of buffers, and 10 MB for quantising. `checked` is called once sources and space are known to suffice,
    before any file of the bundle changes.

    Raises AngelForgeError, before the first byte where that can be known: another process packs into this bundle, a
    tensor is missing, misshapen or of a type that cannot be converted, too little space; later: a full disk, a source
    that is unreadable, shortened or changed meanwhile, a value that its new type cannot hold.
    """
    weights = bundle_dir / "weights"
    with explained("create", weights):
        weights.mkdir(parents=True, exist_ok=True)
    check_sources(checkpoint, shards)
    count = workers or _default_workers(shards)
    with lock(weights / ".lock"), OpenFiles() as files:
        remove_leftovers(weights)
        journal = Journal(bundle_dir)
        origins = {shard.file: origin_digest(shard, checkpoint) for shard in shards}
        done = {s.file: record for s in shards if (record := journal.finished(s, origins[s.file])) is not None}
        missing = [shard for shard in shards if shard.file not in done]
        check_space(missing, bundle_dir, count)
        checked()
        job = _Job(checkpoint, bundle_dir, journal, origins, files)
        job.packed = sum(record.size for record in done.values())
        done |= job.run(missing, count, sum(shard.size for shard in shards), progress)
    return [done[shard.file] for shard in shards]


def remove_stale(bundle_dir: Path, keep: Collection[str]) -> list[str]:
    """Removes the weight files that earlier calls of `pack` left in a bundle and that are not in `keep`; returns them.

    To be called when the files of `keep` are complete. Files that `pack` did not write are left alone.
    """
    weights = bundle_dir / "weights"
    if not weights.is_dir():
        return []
    with lock(weights / ".lock"):
        return Journal(bundle_dir).remove_all_but(keep)


def _default_workers(shards: Sequence[Shard]) -> int:
    quantizing = any(isinstance(tensor.source, Quantized) for shard in shards for tensor in shard.tensors)
    return max(2, min(os.cpu_count() or 1, _MOST_QUANTIZING)) if quantizing else _WORKERS


@dataclass
class _Job:
    checkpoint: Checkpoint
    bundle_dir: Path
    journal: Journal
    origins: dict[str, str]
    files: OpenFiles
    packed: int = 0  # bytes
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _rings: list[Ring] = field(default_factory=list)

    def run(
        self, shards: Sequence[Shard], workers: int, total: int, progress: Progress | None
    ) -> dict[str, PackedShard]:
        """Packs all `shards`; the first failure stops the others and is raised."""
        # The largest first: the workers then finish at about the same time.
        queue = sorted(shards, key=lambda shard: -shard.size)

        def watch() -> None:
            if progress is not None:
                progress(self.packed, total)

        records = run_all([partial(self._pack_one, shard) for shard in queue], workers, self._stop, watch)
        watch()
        return {record.file: record for record in records}

    def _advance(self, count: int) -> None:
        with self._lock:
            self.packed += count

    def _pack_one(self, shard: Shard) -> PackedShard:
        with self._lock:
            ring = self._rings.pop() if self._rings else make_ring()
        path = self.bundle_dir / shard.file
        with atomic_file(path) as temporary:
            quantizer = FileQuantizer(self.checkpoint, self.files)
            runs = shard_runs(shard, self.checkpoint, self.files, quantizer)
            sha256 = write_shard(temporary, runs, ring, self._stop, self._advance)
            if origin_digest(shard, self.checkpoint) != self.origins[shard.file]:
                raise AngelForgeError(
                    f"The checkpoint {self.checkpoint.folder} changed while {shard.file} was made of it. "
                    "Repeat the export when nothing writes to the checkpoint any more."
                )
        with self._lock:
            self._rings.append(ring)
        return self.journal.add(shard, self.origins[shard.file], sha256, quantizer.errors)
