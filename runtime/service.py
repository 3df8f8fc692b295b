"""The thread that owns the stepper: requests come from asyncio, and their deltas go back to it."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from angelforge.errors import AngelForgeError
from angelforge.runtime.call import Call, Work
from angelforge.runtime.llm import LLM
from angelforge.runtime.observer import Load, Observer
from angelforge.runtime.request import Delta

#: ok; draining: takes nothing new; failing: the last steps failed; ended: the thread is gone, nothing is computed.
Health = Literal["ok", "draining", "failing", "ended"]

_FAILING = 3  # failed steps in a row from which on the service does not call itself healthy
_PAUSE = 0.02  # seconds until a scheduler that had nothing to do is asked again while requests are open
ENDED = "The engine's thread has ended. Look at the server's standard error, and start it again."
_STOPPED = "The server is shutting down."


class BusyError(AngelForgeError):
    """As many requests as are allowed are open already."""


class UnavailableError(AngelForgeError):
    """The service takes no requests: it shuts down, or its engine is gone."""


@dataclass(frozen=True)
class _News:
    """What one step, or a few of them, made: deltas by call, and how long the steps took."""

    calls: list[tuple[Call, list[Delta]]]
    steps: list[float]
    time: float
    load: Load


class Service:
    """Runs an `LLM` in a thread of its own for any number of asyncio tasks of one event loop.

    `start` it in the loop, `stop` it at the end; meanwhile nothing else may use the LLM but for `make_request`. A
    request that fails ends with an error, and the others go on; an engine that keeps failing shows in `health`.
    """

    def __init__(self, llm: LLM, *, max_requests: int = 256, observer: Observer | None = None) -> None:
        """At most `max_requests` requests are open at once, waiting ones included; `observer` is told what happens."""
        self.llm = llm
        self.max_requests = max_requests
        self.load = Load.of(llm)
        self._observer = observer or Observer()
        self._wake = threading.Condition()
        self._inbox: deque[tuple[Call, str | None, bool]] = deque()  # guarded by _wake: call, error, whether to add it
        self._stopping = False  # guarded by _wake
        self._ended = False  # guarded by _wake
        self._failures = 0  # steps in a row whose requests all ended with an error
        self._draining = False  # of the event loop, as all below
        self._open: dict[Call, None] = {}  # in the order they came
        self._idle = asyncio.Event()
        self._idle.set()
        self.crashed = asyncio.Event()  # set when the thread has ended without being told to
        self._loop: asyncio.AbstractEventLoop | None = None
        # A daemon: a process that is told to end twice does not wait for a step.
        self._thread = threading.Thread(target=self._run, name="angelforge-engine", daemon=True)

    @property
    def health(self) -> Health:
        """Whether requests are worth sending."""
        if self._ended:
            return "ended"
        if self._draining:
            return "draining"
        return "failing" if self._failures >= _FAILING else "ok"

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return sum(call.left for call in self._open)

    def start(self) -> None:
        """Starts the thread; call it in the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, work: Sequence[Work]) -> Call:
        """Queues requests that belong together, all or none.

        Raises UsageError for one that can never run, BusyError if too many requests are open, UnavailableError if none
        are taken.
        """
        if self._draining or self._ended:
            raise UnavailableError(ENDED if self._ended else _STOPPED)
        if self.open_requests + len(work) > self.max_requests:
            raise BusyError(f"{self.open_requests} requests are open, and {self.max_requests} may be. Try again later.")
        call = Call(self.llm, work, self._cancel)
        self._open[call] = None
        self._idle.clear()
        if not self._send(call, None, adding=True):
            del self._open[call]
            raise UnavailableError(ENDED)
        return call

    async def drain(self, seconds: float) -> None:
        """Takes nothing new, waits so long for what is open, and ends the rest with an error."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except asyncio.TimeoutError:
            for call in list(self._open):
                self._send(call, _STOPPED, adding=False)
            await self._idle.wait()

    async def stop(self) -> None:
        """Ends what is open and then the thread; the LLM stays open. Stopping twice is fine."""
        if self._thread.ident is None:
            return
        self._draining = True
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _cancel(self, call: Call) -> None:
        self._send(call, None, adding=False)

    def _send(self, call: Call, error: str | None, *, adding: bool) -> bool:
        """Hands a call to the thread; False if that is gone."""
        with self._wake:
            if not self._ended:
                self._inbox.append((call, error, adding))
                self._wake.notify()
            return not self._ended

    def _deliver(self, news: _News) -> None:
        """In the event loop: hands out deltas and tells the observer."""
        self.load = news.load
        self._observer.stepped(news.steps)
        for call, deltas in news.calls:
            call.observe(deltas, news.time, self._observer)
            call.deliver(deltas)
            if call.left == 0:
                self._open.pop(call, None)
        if not self._open:
            self._idle.set()

    # From here on: the thread.

    def _run(self) -> None:
        calls: dict[Call, None] = {}
        try:
            while self._take(calls):
                self._step(calls)
            for call in calls:
                self._end(call, _STOPPED)
        finally:
            with self._wake:
                self._ended = True
                crashed = not self._stopping
                calls.update((call, None) for call, _, adding in self._inbox if adding)
            # Only after a bug or a lack of memory, which Python tells, is anything open here: what the stepper thinks
            # of it is not to be trusted any more.
            for request in (request for call in calls for request in call.requests):
                request.end("error", ENDED)
            self._publish(calls, [])
            if crashed:
                self._in_loop(self.crashed.set)

    def _take(self, calls: dict[Call, None]) -> bool:
        """Waits until there is something to do and takes what has come in; False to stop."""
        with self._wake:
            while not calls and not self._inbox and not self._stopping:
                self._wake.wait()
            inbox = list(self._inbox)
            self._inbox.clear()
            if self._stopping:
                calls.update((call, None) for call, _, adding in inbox if adding)
                return False
        for call, error, adding in inbox:
            if adding:
                calls[call] = None
                self._add(call)
            else:
                self._end(call, error)
        return True

    def _add(self, call: Call) -> None:
        for request in call.requests:
            try:
                self.llm.stepper.add(request)
            except AngelForgeError as error:
                call.fault = "refused"
                request.end("error", str(error))

    def _end(self, call: Call, error: str | None) -> None:
        for request in call.requests:
            if not request.finished:
                call.fault = "stopped" if error == _STOPPED else call.fault
                self.llm.stepper.end(request, error)

    def _step(self, calls: dict[Call, None]) -> None:
        begin = perf_counter()
        worked = self.llm.stepper.step()
        self._publish(calls, [perf_counter() - begin] if worked else [])
        if not worked and calls:
            with self._wake:
                if not self._inbox and not self._stopping:
                    self._wake.wait(_PAUSE)

    def _publish(self, calls: dict[Call, None], steps: list[float]) -> None:
        """Collects what the calls' requests have put out and sends it to the event loop at once."""
        news = [(call, call.collect()) for call in calls if call.outbox]
        if steps:
            outputs = [delta.output for call, deltas in news if call.fault is None for delta in deltas]
            failed = len(outputs) > 0 and all(output is not None and output.error is not None for output in outputs)
            self._failures = self._failures + 1 if failed else 0
        for call, _ in news:
            if all(request.finished for request in call.requests):
                del calls[call]
        if news or steps:
            told = _News(news, steps, perf_counter(), Load.of(self.llm))
            self._in_loop(lambda: self._deliver(told))

    def _in_loop(self, tell: Callable[[], None]) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the event loop was closed first: nobody is left who could be told
                self._loop.call_soon_threadsafe(tell)
