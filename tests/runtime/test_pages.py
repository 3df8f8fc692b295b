"""Pages are never owned twice unless they are shared, never lost, and page 0 is never given out."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from angelforge.errors import AngelForgeError
from angelforge.runtime.pages import Lease, PagePool
from angelforge.runtime.prefixes import PageKeys

CAPACITY = 12


def key(*path):
    return repr(path).encode()


class Leasing(RuleBasedStateMachine):
    """Random leases that share, grow, publish and end in any order; a model knows what every page holds."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(CAPACITY + 1)
        self.leases = []  # (lease, its path: what its pages hold one after another)
        self.holds = {}  # page → what was written there last

    @rule(path=st.lists(st.integers(0, 1), max_size=4))
    def begin(self, path):
        lease = Lease(self.pool, CAPACITY)
        keys = [key(*path[: n + 1]) for n in range(len(path))]
        shared = self.pool.match(keys)
        lease.share(shared)
        for place, page in enumerate(shared):
            assert self.holds[page] == tuple(path[: place + 1])
        self.leases.append((lease, path[: len(shared)]))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), more=st.integers(0, 4))
    def grow(self, data, more):
        lease, path = data.draw(st.sampled_from(self.leases))
        before, free = lease.pages[: lease.count].tolist(), self.pool.free
        count = min(lease.count + more, CAPACITY)
        fits = count - lease.count <= free
        assert lease.grow(count) == fits
        assert lease.pages[: len(before)].tolist() == before
        assert lease.count == (count if fits else len(before))
        assert self.pool.free == free - (lease.count - len(before))
        for page in lease.pages[len(before) : lease.count].tolist():
            path.append(data.draw(st.integers(0, 1)))
            self.holds[page] = tuple(path)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def publish(self, data):
        lease, path = data.draw(st.sampled_from(self.leases))
        count = data.draw(st.integers(0, lease.count))
        lease.publish([key(*path[: n + 1]) for n in range(count)])

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), twice=st.booleans())
    def release(self, data, twice):
        lease, _ = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.release()
        if twice:
            lease.release()

    @invariant()
    def every_page_has_its_place(self):
        pool = self.pool
        held = Counter(page for lease, _ in self.leases for page in lease.pages[: lease.count].tolist())
        assert [held[page] for page in range(CAPACITY + 1)] == pool._uses
        assert sorted([*held, *pool._empty, *pool._idle]) == list(range(1, CAPACITY + 1))
        assert pool.free == CAPACITY - len(held)
        assert all(pool._keys[page] == name for name, page in pool._published.items())
        assert all(pool._keys[page] is None for page in pool._empty)
        assert pool.cached == sum(name is not None for name in pool._keys)
        shared = [page for page, count in held.items() if count > 1]
        assert all(pool._keys[page] is not None for page in shared)

    @invariant()
    def what_a_lease_holds_is_what_it_wrote_or_found(self):
        for lease, path in self.leases:
            for place, page in enumerate(lease.pages[: lease.count].tolist()):
                assert self.holds[page] == tuple(path[: place + 1])


TestLeasing = Leasing.TestCase


def test_a_pool_needs_a_page_beside_page_0():
    with pytest.raises(AngelForgeError, match="at least 2"):
        PagePool(1)


def test_the_page_unused_for_longest_goes_first_and_ends_before_begins():
    pool = PagePool(6)
    first, second = Lease(pool, 5), Lease(pool, 5)
    first.grow(3)
    first.publish([key(0), key(0, 0), key(0, 0, 0)])
    second.grow(2)
    second.publish([key(1)])
    first.release()
    second.release()
    assert (pool.free, pool.cached) == (5, 4)
    third = Lease(pool, 5)
    third.grow(1)  # the page that holds nothing
    assert pool.cached == 4
    third.grow(3)  # the ends of the first
    assert len(pool.match([key(0), key(0, 0)])) == 1
    third.grow(5)
    assert pool.cached == 0


@given(st.lists(st.integers(0, 1), max_size=40), st.lists(st.integers(0, 1), max_size=40), st.integers(1, 5))
def test_keys_are_equal_where_all_before_is(one, other, size):
    for drafted in (False, True):
        keys = []
        for ids in (one, other):
            found = PageKeys(size, drafted)
            for length in range(len(ids) + 1):  # as a sequence grows
                grown = list(found.of(np.array(ids[:length], np.int64), 99))
            assert grown == PageKeys(size, drafted).of(np.array(ids, np.int64), 99)
            assert len(grown) == max(0, len(ids) - drafted) // size
            assert PageKeys(size, drafted).of(np.array(ids, np.int64), 2) == grown[:2]
            keys.append(grown)
        for page, (first, second) in enumerate(zip(*keys, strict=False)):
            end = (page + 1) * size + drafted
            assert (first == second) == (one[:end] == other[:end])
