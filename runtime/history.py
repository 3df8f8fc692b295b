"""What a request's penalties look at: the ids of prompt and output, each once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from angelforge.runtime.batch import Float32, Int64


class Counted(Protocol):
    """Ids, each once, and how often each came out."""

    @property
    def ids(self) -> Int64:
        """int64 [n] the ids of prompt and output, each once, in no order."""

    @property
    def counts(self) -> Float32:
        """f32 [n] how often each of `ids` is in the output; 0 for those that only the prompt has."""


@dataclass(frozen=True, eq=False)
class Seen:
    """A history as it stands at one place of a chain."""

    ids: Int64
    counts: Float32


class History:
    """The ids that prompt and output hold, and how often each came out. A token more is O(1), however long they are."""

    def __init__(self, prompt: Int64, output: Int64 | None = None) -> None:
        """Of a prompt int64 [n] and what came out so far int64 [m]."""
        self._ids: Int64 = np.unique(prompt).astype(np.int64)
        self._counts: Float32 = np.zeros(self._ids.shape[0], np.float32)
        self._size = self._of_prompt = self._ids.shape[0]
        self._places = {token: place for place, token in enumerate(self._ids.tolist())}
        self._follower: object = None
        self._changed: list[int] = []  # places, since the follower was told
        for token in [] if output is None else output.tolist():
            self.add(token)

    @property
    def ids(self) -> Int64:
        """int64 [n] every id of prompt or output once, in no order."""
        return self._ids[: self._size]

    @property
    def counts(self) -> Float32:
        """f32 [n] how often each of `ids` is in the output."""
        return self._counts[: self._size]

    @property
    def size(self) -> int:
        """Of `ids`."""
        return self._size

    def count(self, token: int) -> int:
        """How often an id is in the output."""
        place = self._places.get(token)
        return 0 if place is None else int(self._counts[place])

    def changes(self, follower: object) -> list[int] | None:
        """Places of `ids` and `counts` that are not what they were when the same follower asked last.

        None where it has not asked before, or another has since: then all of them. Some may be behind the end.
        """
        known, self._changed = self._changed, []
        if follower is self._follower:
            return known
        self._follower = follower
        return None

    def add(self, token: int) -> None:
        """`token` came out."""
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = self._size
            if place == self._ids.shape[0]:
                self._ids = np.concatenate([self._ids, np.zeros(place + 8, np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(place + 8, np.float32)])
            self._ids[place] = token
            self._counts[place] = 0
            self._size += 1
        self._counts[place] += 1
        self._note(place)

    def take_back(self, token: int) -> None:
        """Undoes the last `add`, which was of `token`: what a draft only proposes is added and taken back."""
        place = self._places[token]
        self._counts[place] -= 1
        if place >= self._of_prompt and self._counts[place] == 0:  # then it was new, and is the last
            del self._places[token]
            self._size -= 1
        self._note(place)

    def _note(self, place: int) -> None:
        if self._follower is not None:
            self._changed.append(place)
