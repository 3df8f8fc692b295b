"""Signs of life: every rank writes a number that rises to the group's store, twice a second, and reads the others'."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from typing import Any

_BEAT = 0.5  # s between two signs
SILENT = 5  # looks, a second apart, without a sign: the rank hangs. Looks, not seconds: a job may be suspended
_CERTAIN = 2.0  # s without a sign after something has failed
STORE_GONE = "The process that keeps the ranks together (torchrun, or rank 0) has died."


class Heartbeat:
    """This rank's signs, and how the others' are read."""

    def __init__(self, store: Any, rank: int, ranks: int) -> None:
        self._store, self._rank = store, rank
        self._others = [each for each in range(ranks) if each != rank]
        self._stopped = threading.Event()
        store.set(f"process/{rank}", f"{socket.gethostname()} {os.getpid()}")
        store.set(f"beat/{rank}", "0")
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def watch(self, patience: int = SILENT) -> Watch:
        """Begins to wait for the others; `patience` looks without a sign are too many."""
        return Watch(self, patience)

    def culprit(self) -> str | None:
        """Who has ended the group, as a sentence; None where all are alive. Takes up to 3 s."""
        with suppress(RuntimeError):
            if told := self.told():
                return told
            before = self.signs()
            time.sleep(_CERTAIN)
            if told := self.told():
                return told
            after = self.signs()
            silent = [rank for rank in self._others if before[rank] == after[rank]]
            dead = self.without_those_that_left(silent)
            return self.describe(dead) if dead else None
        return STORE_GONE

    def report(self, message: str) -> None:
        """Says why this rank gives up."""
        with suppress(RuntimeError):
            self._store.set(f"failed/{self._rank}", message)

    def leave(self) -> None:
        """Says that this rank ends because the group has: nobody need take it for the cause."""
        with suppress(RuntimeError):
            self._store.set(f"left/{self._rank}", "1")

    def without_those_that_left(self, ranks: list[int]) -> list[int]:
        """Ranks that have not said that they end; raises RuntimeError where the store is gone."""
        return [rank for rank in ranks if not self._store.check([f"left/{rank}"])]

    def signs(self) -> dict[int, bytes]:
        """The latest sign of every other rank; raises RuntimeError where the store is gone."""
        return {rank: self._store.get(f"beat/{rank}") for rank in self._others}

    def stop(self) -> None:
        """Ends the signs."""
        self._stopped.set()
        self._thread.join()

    def kill_silent(self, rank: int) -> None:
        """Kills a rank of this machine that hangs: what waits for it then fails at once."""
        host, number = self._store.get(f"process/{rank}").decode().split()
        if host == socket.gethostname():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(int(number), signal.SIGKILL)

    def _beat(self) -> None:
        count = 0
        while not self._stopped.wait(_BEAT):
            count += 1
            try:
                self._store.set(f"beat/{self._rank}", str(count))
            except RuntimeError:  # the store is gone; whoever waits for the others finds that too
                return

    def told(self) -> str | None:
        """What a rank that gave up has said, as a sentence; raises RuntimeError where the store is gone."""
        for rank in self._others:
            if self._store.check([f"failed/{rank}"]):
                return f"Rank {rank} gave up: {self._store.get(f'failed/{rank}').decode()}"
        return None

    def describe(self, dead: list[int], what: str = "died") -> str:
        """A sentence about ranks that have died, or done whatever else."""
        names = " and ".join(f"{rank} ({self._store.get(f'process/{rank}').decode().split()[1]})" for rank in dead)
        return f"Rank {names} has {what}." if len(dead) == 1 else f"Ranks {names} have {what}."


class Watch:
    """Looks at the others' signs while something waits for them."""

    def __init__(self, heartbeat: Heartbeat, patience: int) -> None:
        self._heartbeat, self._patience = heartbeat, patience
        self._signs: dict[int, bytes] = {}
        self._silent: dict[int, int] = {}

    def lost(self) -> str | None:
        """To be called once a second: who gave up or hangs, as a sentence, else None. A rank that hangs is killed."""
        try:
            if told := self._heartbeat.told():
                return told
            for rank, sign in self._heartbeat.signs().items():
                self._silent[rank] = self._silent.get(rank, 0) + 1 if self._signs.get(rank) == sign else 0
                self._signs[rank] = sign
            hanging = [rank for rank, looks in self._silent.items() if looks >= self._patience]
            if not hanging:
                return None
            if not (lost := self._heartbeat.without_those_that_left(hanging)):
                return f"Rank {hanging[0]} has ended."
            for rank in lost:
                self._heartbeat.kill_silent(rank)
            return self._heartbeat.describe(lost, "given no sign of life")
        except RuntimeError:
            return STORE_GONE
