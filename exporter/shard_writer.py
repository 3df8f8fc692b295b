"""Writes one weight file from a stream of runs: reading, hashing and writing overlap through a ring of fixed buffers.

Where the file system allows it the page cache is bypassed (O_DIRECT): half the processor time of a cached write, and
the cache is left to others. Measured against `shutil.copyfile` by `angelforge.exporter.measure`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from angelforge.diskerrors import explained
from angelforge.exporter.copying import Run

BUFFER = 4 << 20  # bytes
_RING = 4  # one being filled, one being hashed, one being written, one ready
_SECTOR = 4096  # direct writes begin and end at its multiples
_FLUSH = 32 << 20  # bytes after which a cached write is sent on to the disk

# Page aligned, private: a ring is made once for a worker and used for all its files.
Ring = tuple[mmap.mmap, ...]


def make_ring() -> Ring:
    """The buffers of one worker; pages that are never filled take no memory."""
    return tuple(mmap.mmap(-1, BUFFER, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(_RING))


def write_shard(
    path: Path, runs: Iterator[Run], ring: Ring, stop: threading.Event, advance: Callable[[int], None]
) -> str:
    """Writes all runs to the new file `path` (not synced) and returns its sha256.

    `advance` gets the bytes of every buffer that was hashed and handed to the system. Raises AngelForgeError when the
    disk refuses or a source cannot be read, CancelledError soon after `stop` was set.
    """
    digest = hashlib.sha256()
    filler = _Filler(runs)
    slots: list[tuple[Future[Any], ...]] = [()] * len(ring)
    with _Sink(path) as sink, ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as writer:
        turn = 0
        while True:
            for future in slots[turn]:
                future.result()
            if stop.is_set():
                raise CancelledError
            view = memoryview(ring[turn])
            count = filler.fill(view)
            if count == 0:
                break
            slots[turn] = (hasher.submit(digest.update, view[:count]), writer.submit(sink.write, view, count))
            advance(count)
            turn = (turn + 1) % len(ring)
        for future in (future for slot in slots for future in slot):
            future.result()
        sink.finish()
    return digest.hexdigest()


class _Filler:
    """Cuts a stream of runs into buffers."""

    def __init__(self, runs: Iterator[Run]) -> None:
        self._runs = runs
        self._run: Run | None = next(runs, None)
        self._offset = 0  # in the current run

    def fill(self, view: memoryview) -> int:
        """Fills `view` as far as the stream goes and returns how many bytes that were."""
        filled = 0
        while self._run is not None and filled < len(view):
            count = min(len(view) - filled, self._run.nbytes - self._offset)
            if count:
                self._run.fill(view[filled : filled + count], self._offset)
            filled += count
            self._offset += count
            if self._offset == self._run.nbytes:
                self._run, self._offset = next(self._runs, None), 0
        return filled


class _Sink:
    """A new file that is written front to back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0  # bytes appended
        self._flushed = 0
        self._descriptor = -1
        self._direct = False

    def __enter__(self) -> _Sink:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        direct = getattr(os, "O_DIRECT", 0)
        with explained("write", self.path):
            try:
                self._descriptor, self._direct = os.open(self.path, flags | direct, 0o666), bool(direct)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # The file system knows no direct writes. Some create the file before they say so.
                self._descriptor = os.open(self.path, flags & ~os.O_EXCL, 0o666)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def write(self, view: memoryview, count: int) -> None:
        """Appends the first `count` bytes of a page-aligned buffer; only the last one may be less than full."""
        whole = -(-count // _SECTOR) * _SECTOR if self._direct else count  # `finish` cuts what is too much
        done = 0
        with explained("write", self.path):
            while done < count:
                try:
                    done += os.pwrite(self._descriptor, view[done:whole], self.size + done)
                except OSError as error:
                    if not (self._direct and error.errno == errno.EINVAL):
                        raise
                    self._leave_direct()  # refused only now, or after a write that ended inside a sector
                    whole = count
            self.size += count
            if not self._direct and self.size - self._flushed >= _FLUSH:
                self._flush()

    def finish(self) -> None:
        """Cuts the file to the bytes that were appended."""
        with explained("write", self.path):
            os.ftruncate(self._descriptor, self.size)

    def _leave_direct(self) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._direct = False

    def _flush(self) -> None:
        """Starts writing to the disk without waiting, so that the sync at the end finds little left to do."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, self._flushed, self.size - self._flushed, os.POSIX_FADV_DONTNEED)
        self._flushed = self.size
