"""Weights from their files straight to the device, through a few fixed buffers of pinned memory."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from angelforge.diskerrors import explained
from angelforge.errors import AngelForgeError
from angelforge.machine import cores
from angelforge.parallel import run_all
from angelforge.runtime.device import Device
from angelforge.runtime.weight_layout import Piece, Placement, Slice, Slices, Wanted, WeightLayout, pieces_of

__all__ = ["DeviceWeights", "Slice", "Slices", "Wanted", "load_weights"]

Progress = Callable[[int, int], None]  # bytes done, bytes in all

STAGING = 16 << 20  # bytes of one buffer: large enough for the full rate of a disk and of PCIe
_BUFFERS = 2  # of each reader: one is filled while the other is copied
_MOST_READERS = 8


@dataclass(frozen=True, eq=False)
class DeviceWeights:
    """The weights of one engine on the device."""

    layout: WeightLayout
    arena: Any  # torch.Tensor uint8 [layout.nbytes], 256-byte aligned

    def address(self, name: str) -> int:
        """Where a weight begins, a multiple of 256."""
        return int(self.arena.data_ptr()) + self.layout.placements[name].offset

    def bytes_of(self, name: str) -> Any:
        """A weight's bytes, uint8, on the device."""
        place = self.layout.placements[name]
        return self.arena[place.offset : place.offset + place.nbytes]


def load_weights(
    layout: WeightLayout, device: Device, report: Progress | None = None, readers: int | None = None
) -> DeviceWeights:
    """Reads every weight and copies it to the device; returns when all have arrived.

    Host memory: `readers` (by default a thread for each core, at most 8) × 3 buffers of 16 MB, whatever the model.
    `report` is called in the caller's thread. Nothing is kept of a load that fails.

    Raises:
        AngelForgeError: the device has too little memory (before anything is read), or a file is missing, shorter than
            its header says, or unreadable.
    """
    free = device.free_bytes()
    if free < layout.nbytes:
        raise AngelForgeError(
            f"The weights need {layout.nbytes / 1e9:.2f} GB of device memory, but {free / 1e9:.2f} GB are free. End "
            "other programs that use the device, or use a larger one (angelforge plan says which fit)."
        )
    loading = _Loading(layout, device)
    count = readers or min(_MOST_READERS, cores())
    watch = None if report is None else partial(loading.tell, report)
    run_all([partial(_read_all, loading)] * count, count, loading.stop, watch)
    if watch is not None:
        watch()
    return DeviceWeights(layout, loading.arena)


class _Loading:
    """What the readers of one load share."""

    def __init__(self, layout: WeightLayout, device: Device) -> None:
        self.device = device
        self.arena = device.allocate(layout.nbytes)
        self.stop = threading.Event()
        unique: dict[int, Placement] = {place.offset: place for place in layout.placements.values()}
        # deque.popleft is atomic: readers take pieces in the order of the files.
        self.pieces = deque(piece for place in unique.values() for piece in pieces_of(place, STAGING))
        self.total = sum(piece.kept for piece in self.pieces)
        self.done, self.guard = 0, threading.Lock()

    def advance(self, count: int) -> None:
        with self.guard:
            self.done += count

    def tell(self, report: Progress) -> None:
        report(self.done, self.total)


def _read_all(loading: _Loading) -> None:
    """One reader: takes pieces until none are left or another reader has failed."""
    with loading.device.bound():
        _read_pieces(loading)


def _read_pieces(loading: _Loading) -> None:
    device, stream = loading.device, loading.device.stream()
    device.follow(stream, None)  # the arena may be memory that earlier work has not finished with
    buffers = [device.staging(STAGING) for _ in range(_BUFFERS)]
    marks: list[Any] = [None] * _BUFFERS
    rows = np.empty(STAGING, np.uint8)  # pages of it exist only once something is cut out of rows
    files: dict[Path, int] = {}
    turn = 0
    try:
        while not loading.stop.is_set():
            try:
                piece = loading.pieces.popleft()
            except IndexError:
                break
            buffer, turn = turn, (turn + 1) % _BUFFERS
            if marks[buffer] is not None:
                device.wait(marks[buffer])
            _read(piece, files, rows if piece.runs else buffers[buffer].numpy())
            if piece.runs:
                _cut(piece, rows, buffers[buffer].numpy())
            with device.on(stream):
                target = loading.arena[piece.target : piece.target + piece.kept]
                target.copy_(buffers[buffer][: piece.kept], non_blocking=True)
            marks[buffer] = device.mark(stream)
            loading.advance(piece.kept)
        for mark in marks:
            if mark is not None:
                device.wait(mark)
    finally:
        for descriptor in files.values():
            os.close(descriptor)


def _read(piece: Piece, files: dict[Path, int], into: Any) -> None:
    view, done = memoryview(into), 0
    with explained("read", piece.path):
        if piece.path not in files:
            files[piece.path] = os.open(piece.path, os.O_RDONLY)
        while done < piece.nbytes:
            count = os.preadv(files[piece.path], [view[done : piece.nbytes]], piece.offset + done)
            if count == 0:
                raise AngelForgeError(
                    f"{piece.path} ends at byte {piece.offset + done}, inside a tensor: it was shortened after the "
                    "bundle was opened. Fetch or export it again, complete."
                )
            done += count


def _cut(piece: Piece, rows: Any, into: Any) -> None:
    """Keeps the runs of every row, one after another."""
    source = rows[: piece.nbytes].reshape(-1, piece.row)
    target = into[: piece.kept].reshape(source.shape[0], -1)
    at = 0
    for begin, end in piece.runs:
        target[:, at : at + end - begin] = source[:, begin:end]
        at += end - begin
