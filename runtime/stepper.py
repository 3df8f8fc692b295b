"""The loop body of generation: schedule, pack, compute, choose tokens, hand out, and let a draft propose the next."""

from __future__ import annotations

from time import perf_counter

from angelforge.errors import AngelForgeError
from angelforge.runtime.choosing import Chooser
from angelforge.runtime.engines import Engine
from angelforge.runtime.limits import Limits
from angelforge.runtime.packing import pack
from angelforge.runtime.request import Request
from angelforge.runtime.scheduler import Scheduler
from angelforge.runtime.speculation import Speculator


class Stepper:
    """Drives one engine for any number of requests; what they produce goes to each request's `outbox`.

    All calls must come from one thread.
    """

    def __init__(
        self, engine: Engine, limits: Limits, speculator: Speculator | None = None, chooser: Chooser | None = None
    ) -> None:
        """`chooser` takes tokens from logits, by default one made for the engine; a benchmark times its parts.

        Raises AngelForgeError where the engine's device cannot be made ready to choose.
        """
        self.engine = engine
        self.scheduler = Scheduler(limits, 0 if speculator is None else speculator.most, speculator is not None)
        self.speculator = speculator
        self._chooser = chooser or Chooser.beside(engine)

    def add(self, request: Request) -> None:
        """Queues a request; raises UsageError if the cache could not hold its longest output even alone."""
        self.scheduler.add(request)

    def step(self) -> bool:
        """Computes one step; False if there was nothing to do.

        An engine that fails ends the requests of the step with finish reason "error"; others go on.
        """
        scheduler = self.scheduler
        step = scheduler.schedule()
        if not step:
            return False
        batch = pack([scheduled.piece for scheduled in step], scheduler.limits.page_size)
        begin = perf_counter()
        try:
            logits = self.engine.forward(batch)
            seconds = perf_counter() - begin
            wanting = scheduler.advance(step)
            if self.speculator is not None:
                self.speculator.checking(wanting, seconds)
            self._chooser.choose(step, logits, self.speculator)
            if self.speculator is not None:
                self.speculator.propose(step)
        except AngelForgeError as error:
            for scheduled in step:
                self.end(scheduled.request, str(error))
            return True
        for scheduled in step:
            scheduler.publish(scheduled.request)
            if scheduled.request.finished:
                self._forget(scheduled.request)
        return True

    def end(self, request: Request, error: str | None = None) -> None:
        """Ends a request at once and frees its pages: cancelled, or failed where there is an `error`."""
        self._forget(request)
        request.end("cancelled" if error is None else "error", error)

    def _forget(self, request: Request) -> None:
        self.scheduler.remove(request)
        if self.speculator is not None:
            self.speculator.forget(request)
