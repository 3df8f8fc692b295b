"""Pages of the KV pool: who owns which, and how many are promised."""

from __future__ import annotations

import numpy as np

from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Int32


class PagePool:
    """The pages of one KV pool; taking and giving back one page are O(1).

    Page 0 receives what padding rows write and is never given out. A sequence holds a `Lease`: a promise of so many
    pages, taken one by one as the sequence grows. Promises never exceed the pool, so growing within one cannot fail.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise AngelForgeError(
                f"A KV pool of {num_pages} pages holds nothing: at least 2 are needed (page 0 is spare)."
            )
        self.capacity = num_pages - 1  # pages that sequences can hold
        self.promised = 0  # the sum of the limits of all leases
        self._free = list(range(num_pages - 1, 0, -1))  # a stack: the page given back last is still in the CPU's cache

    @property
    def free(self) -> int:
        """Pages that no sequence holds, promised or not."""
        return len(self._free)

    def lease(self, limit: int) -> Lease | None:
        """A promise of `limit` pages, or None while that many are not left."""
        if self.promised + limit > self.capacity:
            return None
        self.promised += limit
        return Lease(self, limit)


class Lease:
    """The pages of one sequence; made by `PagePool.lease`, given back by `release`."""

    def __init__(self, pool: PagePool, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self.pages: Int32 = np.zeros(limit, np.int32)  # [limit]; the first `count` are held, the rest is 0
        self._pool = pool

    def grow(self, count: int) -> None:
        """Takes pages until the sequence holds `count`; raises AngelForgeError beyond the promise."""
        if count > self.limit:
            raise AngelForgeError(f"A sequence asked for {count} pages, but {self.limit} were promised to it.")
        free = self._pool._free
        while self.count < count:
            self.pages[self.count] = free.pop()
            self.count += 1

    def release(self) -> None:
        """Gives all pages and the promise back; a released lease holds nothing, releasing it again changes nothing."""
        self._pool._free.extend(self.pages[: self.count].tolist())
        self._pool.promised -= self.limit
        self.limit = self.count = 0
