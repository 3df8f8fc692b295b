"""An engine that several ranks run together: the first one's calls are every other one's, until it closes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Batch
from angelforge.runtime.batch_bytes import decode, encode
from angelforge.runtime.engines import Engine
from angelforge.runtime.group import LOADING, Group
from angelforge.runtime.heartbeat import STORE_GONE

_LOAD, _BATCH, _STOP = b"L", b"B", b"S"

Load = Callable[[int], Engine]  # from the pool's pages to a rank's part of the engine
Settle = Callable[[Engine], None]  # returns when what the engine has begun is done


def _nothing(engine: Engine) -> None:
    """An engine that returns when it is done has nothing to settle."""


class RankedEngine:
    """Rank 0's engine; implements `Engine`. `local` is its own part of the model."""

    def __init__(self, load: Load, choose_pages: Callable[[], int], group: Group, settle: Settle = _nothing) -> None:
        """Lets all ranks load their parts, with as many pages each. Raises AngelForgeError where one of them cannot.

        The group is left then, and the other ranks are told.
        """
        self.group, self._settle = group, settle
        try:
            group.end_at_sigterm()
            num_pages = choose_pages()
            group.send(_LOAD + num_pages.to_bytes(8, "little"))
            self.local = load(num_pages)
            group.barrier(LOADING)
        except AngelForgeError as error:
            if group.failure is None:
                group.report(str(error))
            group.close()
            raise
        self.config, self.page_size, self.max_context = self.local.config, self.local.page_size, self.local.max_context
        self.num_pages = self.local.num_pages
        self.max_tokens: int = getattr(self.local, "max_tokens", 2**31)  # of one step
        self.max_rows: int | None = getattr(self.local, "max_rows", None)  # of logits in one step
        self.logits_device: Any = getattr(self.local, "logits_device", None)  # where they stay, if not on the host

    def forward(self, batch: Batch) -> Any:
        """As `Engine.forward`, on all ranks. Raises AngelForgeError where the group has ended, always from then on."""
        cause = "A step was interrupted."
        try:
            self.group.send(_BATCH + encode(batch))
            logits = self.local.forward(batch)
            self._settle(self.local)
            cause = ""
            return logits
        except AngelForgeError as error:
            cause = str(error)
            raise
        finally:
            if cause and self.group.failure is None:
                # The others wait for a part that does not come: the group cannot go on.
                self.group.failure = f"{cause} The ranks have ended; start them again."

    def close(self) -> None:
        """Lets the other ranks go and frees this one's engine."""
        try:
            if self.group.failure is None:
                self.group.send(_STOP)
            else:
                self.group.leave()
        finally:
            self.local.close()
            self.group.close()


def follow(load: Load, group: Group, settle: Settle = _nothing) -> NoReturn:
    """The life of every rank but the first: loads its part, makes the calls that rank 0 makes, and ends with it.

    Raises:
        SystemExit: always; with code 1, and a message where rank 0 can no longer show one, if the group has failed.
    """
    if threading.current_thread() is threading.main_thread():  # rank 0 decides when all end
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    engine = None
    try:
        message = group.receive()
        if message[:1] == _LOAD:
            engine = load(int.from_bytes(message[1:], "little"))
            group.barrier(LOADING)
            while (message := group.receive())[:1] == _BATCH:
                engine.forward(decode(message[1:]))
                settle(engine)
            engine.close()
    except AngelForgeError as error:
        if group.failure is None:
            group.report(str(error))
        group.leave()
        if engine is not None:
            engine.close()
        group.close()
        shown = group.rank == 1 and ("Rank 0 (" in str(error) or STORE_GONE in str(error))
        raise SystemExit(f"error: {error}" if shown else 1) from None
    group.close()
    raise SystemExit(0)
