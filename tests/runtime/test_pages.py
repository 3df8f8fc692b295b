"""Pages are never owned twice, never lost, and page 0 is never given out."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from angelforge.errors import AngelForgeError
from angelforge.runtime.pages import PagePool

CAPACITY = 12


class Leasing(RuleBasedStateMachine):
    """Random leases that grow and end in any order."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(CAPACITY + 1)
        self.leases = []

    @rule(limit=st.integers(0, CAPACITY + 1))
    def lease(self, limit):
        left = CAPACITY - sum(lease.limit for lease in self.leases)
        lease = self.pool.lease(limit)
        assert (lease is not None) == (limit <= left)
        if lease is not None:
            self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def grow_within_the_promise(self, data):
        lease = data.draw(st.sampled_from(self.leases))
        before = lease.pages[: lease.count].tolist()
        count = data.draw(st.integers(0, lease.limit))
        lease.grow(count)
        assert lease.count == max(count, len(before))
        assert lease.pages[: len(before)].tolist() == before

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def grow_beyond_the_promise(self, data):
        lease = data.draw(st.sampled_from(self.leases))
        with pytest.raises(AngelForgeError, match="promised"):
            lease.grow(lease.limit + 1)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), twice=st.booleans())
    def release(self, data, twice):
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.release()
        if twice:
            lease.release()

    @invariant()
    def every_page_has_one_place(self):
        held = [page for lease in self.leases for page in lease.pages[: lease.count].tolist()]
        assert sorted(held + self.pool._free) == list(range(1, CAPACITY + 1))
        assert self.pool.free == CAPACITY - len(held)
        assert self.pool.promised == sum(lease.limit for lease in self.leases)


TestLeasing = Leasing.TestCase


def test_a_pool_needs_a_page_beside_page_0():
    with pytest.raises(AngelForgeError, match="at least 2"):
        PagePool(1)
