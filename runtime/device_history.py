"""What was seen of each request, kept on a device: a step sends what is new there and not what was there before.

A table has a line for each history: ids, and how often each is in the output, in the order of `History.ids`. A line is
given back when its history goes, which is when its request ends, however it ends; a request that is set back keeps it.
Memory: 8 bytes × (a power of two from the longest history on) × (a power of two from their number on), so 8 MB for 32
prompts of 30,000 different ids.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from angelforge.runtime.batch import Int64
from angelforge.runtime.device_transfer import Packed
from angelforge.runtime.history import History

_LEAST_LINES, _LEAST_ROOM = 8, 1024


class DeviceHistories:
    """The histories that a sampler has met and that still exist."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._table = self._empty(_LEAST_LINES, _LEAST_ROOM)
        self._lines: weakref.WeakKeyDictionary[History, int] = weakref.WeakKeyDictionary()
        self._free: deque[int] = deque()  # lines given back: from any thread, so by `append` alone
        self._last: tuple[list[int], int] = ([], 0)  # lines and room that `pack` was asked for last,
        self._begins = np.empty(0, np.int64)  # and what it gave
        self._used = 0  # lines that were ever given out

    @property
    def lines(self) -> int:
        """How many histories have a line."""
        return len(self._lines)

    @property
    def table(self) -> torch.Tensor:
        """Ids and counts, int32 [entries, 2]: a history's are one after another from where it begins."""
        return self._table.view(-1, 2)

    def pack(self, packed: Packed, histories: Sequence[History]) -> Int64:
        """Adds to `packed` what the device does not know of these histories, each once.

        Returns where each begins, int64 [n].
        """
        if not self._lines:  # whatever was large has gone
            self._used, self._free = 0, deque()
            if self._table.shape[:2] != (_LEAST_LINES, _LEAST_ROOM):
                self._table = self._empty(_LEAST_LINES, _LEAST_ROOM)
        places: list[Int64] = []
        entries = []
        few: list[tuple[int, int, int]] = []  # place, id, count: of those that have changed by a few
        lines = [self._line_of(history) for history in histories]
        self._make_room(max(history.size for history in histories))
        room = self._table.shape[1]
        if (lines, room) != self._last:  # else the same object as before, which is not sent again
            self._last, self._begins = (lines, room), np.array(lines, np.int64) * room
        for line, history in zip(lines, histories, strict=True):
            begin = line * room
            ids, counts, changed = history.ids, history.counts, history.changes(self)
            if changed is None and history.size:
                places.append(np.arange(begin, begin + history.size))
                entries.append(np.stack((ids, counts), 1).astype(np.int32))
            else:
                size = history.size
                few += [(begin + at, int(ids[at]), int(counts[at])) for at in set(changed or ()) if at < size]
        if few:
            table = np.array(few, np.int64)
            places.append(table[:, 0])
            entries.append(table[:, 1:].astype(np.int32))
        if places:
            packed.add("history.places", places[0] if len(places) == 1 else np.concatenate(places))
            packed.add("history.entries", entries[0] if len(entries) == 1 else np.concatenate(entries))
        return self._begins

    def update(self, packed: Packed) -> None:
        """Writes what `pack` has sent."""
        if (places := packed.get("history.places")) is not None:
            self.table.index_copy_(0, places, packed["history.entries"])

    def _line_of(self, history: History) -> int:
        line = self._lines.get(history)
        if line is None:
            if self._free:
                line = self._free.popleft()
            else:
                line, self._used = self._used, self._used + 1
            self._lines[history] = line
            weakref.finalize(history, self._free.append, line).atexit = False
        return line

    def _make_room(self, size: int) -> None:
        """Makes the table large enough for all lines and for `size` ids in one; what it holds stays."""
        lines, room = self._table.shape[:2]
        if self._used <= lines and size <= room:
            return
        larger = self._empty(_power_of_two(max(self._used, lines)), _power_of_two(max(size, room)))
        larger[:lines, :room] = self._table
        self._table = larger

    def _empty(self, lines: int, room: int) -> torch.Tensor:
        """int32 [lines, room, 2]: id, count."""
        return torch.empty((lines, room, 2), dtype=torch.int32, device=self._device)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
