"""The processes that share a model, one a rank, started by torchrun: what they send each other, and who is missing.

Rank 0 sends each step's small tensors, all sum what the graph tells them to. Whoever waits for another looks, every
second, at the signs of life that all ranks give: a rank that dies or hangs ends the group with a message that names it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt

from angelforge.errors import AngelForgeError, UsageError
from angelforge.runtime.heartbeat import SILENT, Heartbeat

_JOIN = timedelta(seconds=60)  # for all ranks to arrive
_FOREVER = timedelta(days=1000)  # of gloo's own waits: whether one goes on is decided here
_SLICE = timedelta(seconds=1)  # between two looks at the others
_POLL = 20e-6  # s between two looks at the GPU
LOADING = 120  # s that a rank may give no sign of life while a library loads its engine
_ABORTS = 5  # s that the end of a group waits for NCCL's abort
_INLINE = 8192 - 8  # bytes of a message that go with its length


class Group:
    """One rank's membership. Use it from one thread."""

    def __init__(self, rank: int, ranks: int, store: Any, on_gpus: bool) -> None:
        """Of a process group of torch.distributed that stands; `join` makes both."""
        self.rank, self.ranks = rank, ranks
        self.failure: str | None = None  # why the group has ended
        self._heartbeat = Heartbeat(store, rank, ranks)
        self._open, self._on_gpus = True, on_gpus
        self._aborting: threading.Thread | None = None
        self._restored: signal.Handlers | None = None  # what SIGTERM did before

    @classmethod
    def join(cls, ranks: int, device: str = "cpu") -> Group:
        """Joins the ranks that torchrun started; `device` "cuda" sums with NCCL, else gloo does.

        Raises:
            UsageError: this process was not started by torchrun, or with another number of ranks.
            AngelForgeError: a rank does not arrive within a minute, or has no GPU of its number.
        """
        rank = _rank_of(ranks)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else every lost connection shows frames of C++
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        if device != "cpu":
            from angelforge.runtime.device import open_device

            open_device(f"{device}:{rank}")
        try:
            store, _, _ = next(rendezvous("env://", rank, ranks, timeout=_JOIN))
            here = [f"here/{each}" for each in range(ranks)]
            store.set(here[rank], "1")
            store.wait(here, _JOIN)
            backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=_FOREVER)
        except RuntimeError as error:  # all of torch.distributed's errors are
            raise AngelForgeError(
                f"The {ranks} ranks did not find each other: rank {rank} says: {_first_line(error)}. "
                "End what is left of them and start again."
            ) from error
        return cls(rank, ranks, store, device != "cpu")

    def send(self, message: bytes) -> None:
        """From rank 0 to all others, which `receive` it. Raises AngelForgeError where the group has ended."""
        import torch

        first = np.zeros(_INLINE + 8, np.uint8)
        first[:8] = np.frombuffer(np.int64(len(message)).tobytes(), np.uint8)
        inline = message[:_INLINE]
        first[8 : 8 + len(inline)] = np.frombuffer(inline, np.uint8)
        self._broadcast(torch.from_numpy(first))
        if rest := message[_INLINE:]:
            self._broadcast(torch.from_numpy(np.frombuffer(bytearray(rest), np.uint8)))

    def receive(self) -> bytes:
        """The next message of rank 0, however long it takes. Raises AngelForgeError where the group has ended."""
        import torch

        first = torch.zeros(_INLINE + 8, dtype=torch.uint8)
        self._broadcast(first)
        data = first.numpy().tobytes()
        length = int(np.frombuffer(data, np.int64, 1)[0])
        if length <= _INLINE:
            return data[8 : 8 + length]
        rest = torch.zeros(length - _INLINE, dtype=torch.uint8)
        self._broadcast(rest)
        return data[8:] + rest.numpy().tobytes()

    def all_reduce(self, values: npt.NDArray[np.float32]) -> None:
        """Replaces `values` by their sum over all ranks, in place. Raises AngelForgeError where the group has ended."""
        import torch
        import torch.distributed as dist

        tensor = torch.from_numpy(values)
        self._finish(lambda: dist.all_reduce(tensor, async_op=True))

    def communicator(self) -> Any:
        """The NCCL communicator of this rank's GPU as the PyCapsule that TensorRT's `set_communicator` takes.

        Collective: every rank calls it. This and `set_communicator` block until all have called them: a `barrier`
        before each keeps a rank from waiting there, where nothing can be watched, for one that has died. Raises
        AngelForgeError where torch does not tell it.
        """
        import ctypes

        import torch
        import torch.distributed as dist

        device = torch.device("cuda", torch.cuda.current_device())
        dist.all_reduce(torch.ones(1, device=device))  # makes the communicator
        event = torch.cuda.Event()
        event.record()
        self.wait_for(event.query)
        backend = dist.group.WORLD._get_backend(device)
        if not hasattr(backend, "_comm_ptr"):
            raise AngelForgeError(f"torch {torch.__version__} does not tell its NCCL communicator: take 2.8 or newer.")
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(backend._comm_ptr(), None, None)

    def barrier(self, patience: int = SILENT) -> None:
        """Returns when all ranks have called it. Raises AngelForgeError where the group has ended.

        `patience` in seconds: how long a rank may give no sign of life, as while a library loads.
        """
        import torch
        import torch.distributed as dist

        self._finish(lambda: dist.all_reduce(torch.zeros(1), async_op=True), patience)

    def minimum(self, value: int) -> int:
        """The least of what all ranks say. Raises AngelForgeError where the group has ended."""
        import torch
        import torch.distributed as dist

        tensor = torch.tensor([value])
        self._finish(lambda: dist.all_reduce(tensor, dist.ReduceOp.MIN, async_op=True), LOADING)
        return int(tensor[0])

    def wait_for(self, done: Callable[[], bool]) -> None:
        """Waits until `done` says so (an event on the GPU), as long as all ranks give signs of life.

        Raises AngelForgeError where one does not: NCCL's kernels, which wait for it for ever, are aborted.
        """
        watch, looked = self._heartbeat.watch(), time.monotonic()
        while True:
            try:
                if done():
                    return
            except RuntimeError as error:  # what torch raises for the device's errors, NCCL's among them
                cause = f"The device failed in a step: {_first_line(error)}."
                ended = self.end(cause)
                if self.failure == self._ended(cause):  # nobody else's fault
                    self.report(cause)
                raise ended from error
            time.sleep(_POLL)
            if time.monotonic() - looked < _SLICE.total_seconds():
                continue
            looked = time.monotonic()
            if (lost := watch.lost()) is not None:
                self.failure = self._ended(lost)
                self._abort()
                raise AngelForgeError(self.failure)

    def report(self, message: str) -> None:
        """Tells the others why this rank gives up; rank 0 shows it. The group has ended with it."""
        self.failure = self.failure or message
        self._heartbeat.report(message)

    def end(self, cause: str) -> AngelForgeError:
        """The error that names who is missing, or else `cause`; the group has ended with it. Takes up to 3 s."""
        if self.failure is None:
            culprit = self._heartbeat.culprit()
            self.failure = self._ended(culprit or cause)
        return AngelForgeError(self.failure)

    def leave(self) -> None:
        """Tells the others that this rank ends because the group has; what waits for them on the GPU ends, too.

        An engine can be closed then: it waits for what it has begun.
        """
        self._heartbeat.leave()
        self._abort()

    def end_at_sigterm(self) -> None:
        """Lets this process hear SIGTERM, as torchrun sends it when a rank has died, as an error that names the rank.

        Without it the process would be gone before it can say anything. Raised wherever the main thread is.
        """
        if threading.current_thread() is not threading.main_thread():
            return

        def end(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise self.end("The process was asked to end (SIGTERM).")

        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._restored = signal.SIG_DFL
            signal.signal(signal.SIGTERM, end)

    def close(self) -> None:
        """Leaves the group; closing twice is fine. An engine on GPUs must be closed before.

        Its captured graphs keep an abort from returning, and one that returns while Python ends would end the process
        by a signal (a thread of C++ that asks for Python's lock then is torn down).
        """
        if not self._open:
            return
        self._open = False
        import torch.distributed as dist

        if self._aborting is not None:
            self._aborting.join(_ABORTS)
        self._heartbeat.stop()
        if self.failure is None or not self._on_gpus:  # NCCL would wait for the ranks that are missing
            dist.destroy_process_group()
        if self._restored is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._restored)

    def _abort(self) -> None:
        """Ends what NCCL has on the GPU.

        Only `close` waits for it: NCCL returns only when no CUDA graph that was captured with its sums is left, and the
        engine, which has them, is closed in between.
        """
        import torch
        import torch.distributed as dist

        if self._on_gpus and self._aborting is None:
            backend = dist.group.WORLD._get_backend(torch.device("cuda", torch.cuda.current_device()))
            self._aborting = threading.Thread(target=_quietly, args=(backend.abort,), name="abort", daemon=True)
            self._aborting.start()

    def _ended(self, cause: str) -> str:
        return f"{cause} The {self.ranks} ranks have ended; start them again."

    def _broadcast(self, tensor: Any) -> None:
        import torch.distributed as dist

        self._finish(lambda: dist.broadcast(tensor, 0, async_op=True))

    def _finish(self, begin: Callable[[], Any], patience: int = SILENT) -> None:
        """Waits for a collective as long as all ranks give signs of life."""
        if self.failure is not None:
            raise AngelForgeError(self.failure)
        watch = self._heartbeat.watch(patience)
        try:
            work = begin()
            while not _done_within_a_slice(work):
                if (lost := watch.lost()) is not None:
                    self.failure = self.failure or self._ended(lost)
                    raise AngelForgeError(self.failure)
        except RuntimeError as error:
            raise self.end(f"The connection between the ranks broke: {_first_line(error)}.") from error


def _quietly(call: Callable[[], object]) -> None:
    """The group has ended: what torch says of that is told already."""
    with suppress(RuntimeError):
        call()


def _done_within_a_slice(work: Any) -> bool:
    """Waits for a collective for a second at most; raises RuntimeError where it has failed."""
    try:
        work.wait(_SLICE)
    except RuntimeError:
        if not work.is_completed():
            return False  # only the time has passed
        work.wait()  # raises it again; or it has come to its end just now
    return True


def refuse_stray_ranks(ranks: int) -> None:
    """Raises UsageError where torchrun has started several processes for a model that is to run in one."""
    found = os.environ.get("WORLD_SIZE", "1")
    if ranks == 1 and "TORCHELASTIC_RUN_ID" in os.environ and found != "1":
        raise UsageError(
            f"torchrun started {found} processes, but one rank was asked for: add --tensor-parallel {found}."
        )


def _rank_of(ranks: int) -> int:
    """This process's rank, as torchrun says it."""
    found = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if not all(value.isdigit() for value in found.values()):
        raise UsageError(
            f"--tensor-parallel {ranks} needs {ranks} processes: "
            f"torchrun --standalone --nproc-per-node {ranks} --no-python angelforge …"
        )
    if int(found["WORLD_SIZE"]) != ranks:
        raise UsageError(
            f"torchrun started {found['WORLD_SIZE']} processes, but --tensor-parallel is {ranks}: both must be equal."
        )
    return int(found["RANK"])


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
