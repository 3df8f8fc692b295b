"""Pages of the KV pool: who uses which, and which can be found again by what they hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Int32


class PagePool:
    """The pages of one KV pool; taking and giving back one page are O(1).

    Page 0 receives what padding rows write and is never given out. Sequences hold pages by a `Lease`. A page that is
    published under a key can be shared; when nobody uses it any more it stays as it is until its place is needed, the
    one unused for longest first. Shared pages are never written: a sequence publishes full pages only.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise AngelForgeError(
                f"A KV pool of {num_pages} pages holds nothing: at least 2 are needed (page 0 is spare)."
            )
        self.capacity = num_pages - 1  # pages that sequences can hold
        self.changes = 0  # rises when a page becomes free or is published: what did not fit may fit then
        self._empty = list(range(num_pages - 1, 0, -1))  # a stack: the page given back last is still in the CPU's cache
        self._idle: OrderedDict[int, None] = OrderedDict()  # published and unused, the longest unused first
        self._uses = [0] * num_pages  # leases that hold each page
        self._keys: list[bytes | None] = [None] * num_pages
        self._published: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Pages that no sequence holds."""
        return len(self._empty) + len(self._idle)

    @property
    def cached(self) -> int:
        """Pages that can be found by their key, in use or not."""
        return len(self._published)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The pages published under the first of `keys`, as many as follow each other without a gap."""
        pages = []
        for key in keys:
            page = self._published.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def unused(self, pages: Sequence[int]) -> int:
        """How many of some published pages nobody holds."""
        return sum(self._uses[page] == 0 for page in pages)

    def _take(self) -> int:
        if self._empty:
            page = self._empty.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            key, self._keys[page] = self._keys[page], None
            assert key is not None
            del self._published[key]
        self._uses[page] = 1
        return page

    def _share(self, page: int) -> None:
        if self._uses[page] == 0:
            del self._idle[page]
        self._uses[page] += 1

    def _give_back(self, page: int) -> None:
        self._uses[page] -= 1
        if self._uses[page] == 0:
            if self._keys[page] is None:
                self._empty.append(page)
            else:
                self._idle[page] = None

    def _publish(self, page: int, key: bytes) -> None:
        if key not in self._published and self._keys[page] is None:
            self._published[key] = page
            self._keys[page] = key


class Lease:
    """The pages of one sequence, in their order."""

    def __init__(self, pool: PagePool, limit: int) -> None:
        """Holds nothing yet, and never more than `limit` pages."""
        self.count = 0
        self.pages: Int32 = np.zeros(limit, np.int32)  # [limit]; the first `count` are held, the rest is 0
        self.published = 0  # of the first pages, those that were offered to others or came from them
        self._pool = pool

    def share(self, pages: Sequence[int]) -> None:
        """Begins with published pages; the lease must be empty."""
        assert self.count == 0
        for page in pages:
            self._pool._share(page)
        self.pages[: len(pages)] = pages
        self.count = self.published = len(pages)

    def grow(self, count: int) -> bool:
        """Takes pages until the sequence holds `count`; False, and nothing is taken, if there are not enough."""
        if count <= self.count:
            return True
        if count - self.count > self._pool.free:
            return False
        for place in range(self.count, count):
            self.pages[place] = self._pool._take()
        self.count = count
        return True

    def publish(self, keys: Sequence[bytes]) -> None:
        """Offers the first `len(keys)` pages, which are full, to others; one that is offered already stays the one."""
        for place in range(self.published, len(keys)):
            self._pool._publish(int(self.pages[place]), keys[place])
        self.published = max(self.published, len(keys))
        self._pool.changes += 1

    def release(self) -> None:
        """Gives all pages back, so that the begin is found for longest; releasing again changes nothing."""
        for page in self.pages[: self.count][::-1].tolist():
            self._pool._give_back(page)
        self._pool.changes += 1
        self.count = self.published = 0
