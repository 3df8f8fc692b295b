"""Signs of life among ranks in one process: who is missed, who is not, and what is told."""

import time

import pytest

from angelforge.runtime.heartbeat import STORE_GONE, Heartbeat

torch = pytest.importorskip("torch")


def ranks(count: int) -> list[Heartbeat]:
    store = torch.distributed.HashStore()
    return [Heartbeat(store, rank, count) for rank in range(count)]


def test_all_are_well() -> None:
    """Nobody is named while all give signs, however long that is watched."""
    first, second = ranks(2)
    watch = first.watch(patience=3)
    for _ in range(5):
        assert watch.lost() is None
        time.sleep(0.6)
    assert first.culprit() is None
    first.stop()
    second.stop()


def test_the_silent_one_is_named() -> None:
    """With its process; one that left because the group has ended is not the cause."""
    first, second, third = ranks(3)
    second.stop()
    third.leave()
    third.stop()
    told = first.culprit()
    assert told is not None
    assert told.startswith("Rank 1 (")
    assert told.endswith(") has died.")
    first.stop()


def test_who_left_is_not_killed() -> None:
    """Nor shown as the cause to whoever still waits for it."""
    first, second = ranks(2)
    second.leave()
    second.stop()
    first.kill_silent = lambda rank: pytest.fail("killed")  # type: ignore[method-assign]
    watch = first.watch(patience=1)
    assert [watch.lost(), watch.lost()] == [None, "Rank 1 has ended."]
    first.stop()


def test_of_two_that_are_silent_the_one_that_did_not_leave_is_named() -> None:
    """And killed; only that one."""
    first, second, third = ranks(3)
    second.leave()
    second.stop()
    third.stop()
    killed: list[int] = []
    first.kill_silent = killed.append  # type: ignore[method-assign]
    watch = first.watch(patience=1)
    assert watch.lost() is None
    told = watch.lost()
    assert told is not None
    assert (told[:8], killed) == ("Rank 2 (", [2])
    first.stop()


def test_who_gives_up_says_why() -> None:
    """At once, whatever the signs, to whoever waits for it, too."""
    first, second = ranks(2)
    watch = first.watch()
    assert watch.lost() is None
    second.report("The disk is gone.")
    assert watch.lost() == "Rank 1 gave up: The disk is gone."
    begin = time.monotonic()
    assert first.culprit() == "Rank 1 gave up: The disk is gone."
    assert time.monotonic() - begin < 2  # what it waits for signs
    first.stop()
    second.stop()


def test_a_store_that_is_gone_is_told() -> None:
    """Rank 0 or torchrun held it."""
    first, second = ranks(2)
    first.stop()
    second.stop()

    class Gone:
        def get(self, key: str) -> bytes:
            raise RuntimeError("Connection reset by peer")

        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("Connection reset by peer")

    first._store = Gone()
    assert first.watch().lost() == STORE_GONE
    assert first.culprit() == STORE_GONE
