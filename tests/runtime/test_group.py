"""A rank on a GPU whose group ends: it comes back from NCCL, says why, and does not wait for ranks that are missing."""

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from angelforge.errors import AngelForgeError
from angelforge.runtime.batch_bytes import encode
from angelforge.runtime.group import Group
from angelforge.runtime.heartbeat import Heartbeat
from angelforge.runtime.packing import Piece, pack
from angelforge.runtime.ranked_engine import follow

torch = pytest.importorskip("torch")
dist = torch.distributed


class Nccl:
    """A process group whose abort, as NCCL's, returns only when no captured graph is left."""

    def __init__(self) -> None:
        self.aborted, self.graphs_gone, self.aborts, self.destroyed = threading.Event(), threading.Event(), 0, 0

    def abort(self) -> None:
        self.aborts += 1
        self.aborted.set()
        self.graphs_gone.wait(30)
        raise RuntimeError("NCCL error: unhandled cuda error")

    def _get_backend(self, device: Any) -> "Nccl":
        return self

    def destroy(self) -> None:
        self.destroyed += 1


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nccl]:
    found = Nccl()
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=found))
    monkeypatch.setattr(dist, "destroy_process_group", found.destroy)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    yield found
    found.graphs_gone.set()


def test_a_rank_comes_back_from_a_step_that_another_has_left(nccl: Nccl) -> None:
    """With what the other said, though NCCL is still busy with the abort: captured graphs go when the engine does."""
    store = dist.HashStore()
    group, other = Group(0, 2, store, on_gpus=True), Heartbeat(store, 1, 2)
    other.report("The GPU is gone.")
    begin = time.monotonic()
    with pytest.raises(AngelForgeError, match=r"Rank 1 gave up: The GPU is gone\. The 2 ranks have ended"):
        group.wait_for(lambda: time.monotonic() > begin + 15)
    assert time.monotonic() - begin < 12
    assert nccl.aborted.wait(5)
    group.leave()
    assert nccl.aborts == 1
    nccl.graphs_gone.set()
    group.close()
    other.stop()
    assert nccl.destroyed == 0


def test_a_device_that_fails_is_told_to_all(nccl: Nccl) -> None:
    """Whichever rank's it is: the others would only see that it has gone."""
    store = dist.HashStore()
    group, other = Group(0, 2, store, on_gpus=True), Heartbeat(store, 1, 2)

    def done() -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    told = "The device failed in a step: CUDA error: an illegal memory access was encountered."
    with pytest.raises(AngelForgeError, match=told):
        group.wait_for(done)
    assert other.watch().lost() == f"Rank 0 gave up: {told}"
    group.close()
    other.stop()


def test_an_engine_can_be_closed_when_the_group_has_ended(nccl: Nccl) -> None:
    """Whoever noticed first: torchrun ends rank 0 as soon as another dies, in the middle of a step's sums."""
    group = Group(0, 1, dist.HashStore(), on_gpus=True)
    group.end("The process was asked to end (SIGTERM).")
    assert not nccl.aborted.is_set()
    group.leave()
    assert nccl.aborted.wait(5)
    nccl.graphs_gone.set()
    group.close()


def test_an_abort_ends_before_the_process(nccl: Nccl) -> None:
    """One that returned while Python ends would end it by SIGABRT, whatever its exit code was to be."""
    group = Group(0, 1, dist.HashStore(), on_gpus=True)
    group.end("The process was asked to end (SIGTERM).")
    group.leave()
    threading.Timer(0.3, nccl.graphs_gone.set).start()  # as when the engine has been closed
    group.close()
    assert not any(thread.name == "abort" for thread in threading.enumerate())


@pytest.mark.parametrize("told", [None, "Rank 0 (7) has died."])
def test_a_follower_closes_its_engine_before_it_leaves_a_group_that_failed(told: str | None) -> None:
    """Whether the failure is its own or another's: what NCCL does for it ends only without the engine's graphs."""
    done: list[str] = []

    class Engine:
        def forward(self, batch: Any) -> None:
            raise AngelForgeError(told or "No memory.")

        def close(self) -> None:
            done.append("engine closed")

    class Ended:
        rank, failure = 1, told
        messages = iter(
            [b"L" + bytes(8), b"B" + encode(pack([Piece(np.array([5]), 0, np.array([1], np.int32), 1)], 64))]
        )

        def receive(self) -> bytes:
            return next(self.messages)

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: done.append(name)

    def life() -> None:  # in a thread, since it changes what the main thread does at signals
        with pytest.raises(SystemExit):
            follow(lambda pages: Engine(), Ended())  # type: ignore[arg-type, return-value]

    thread = threading.Thread(target=life)
    thread.start()
    thread.join(10)
    assert done == ["barrier", *(["report"] if told is None else []), "leave", "engine closed", "close"]


@pytest.mark.parametrize("on_gpus", [True, False])
def test_who_gives_up_does_not_wait_for_the_others(nccl: Nccl, on_gpus: bool) -> None:
    """NCCL would, and hide the reason; gloo's connections are closed, which is how the others notice."""
    group = Group(0, 1, dist.HashStore(), on_gpus)
    group.report("The weights do not fit.")
    group.close()
    assert nccl.destroyed == (0 if on_gpus else 1)


def test_a_group_that_ends_well_is_destroyed(nccl: Nccl) -> None:
    Group(0, 1, dist.HashStore(), on_gpus=True).close()
    assert nccl.destroyed == 1
