"""The loop body of generation: schedule, pack, compute, sample, hand out."""

from __future__ import annotations

from angelforge.errors import AngelForgeError
from angelforge.runtime.engines import Engine
from angelforge.runtime.limits import Limits
from angelforge.runtime.packing import pack
from angelforge.runtime.request import Request
from angelforge.runtime.sampler import sample
from angelforge.runtime.scheduler import Scheduler

_NO_TOKEN = (
    "The engine computed no finite logits, so no token could be chosen. Check the weights with `inspect --verify`."
)


class Stepper:
    """Drives one engine for any number of requests; what they produce goes to each request's `outbox`."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine = engine
        self.scheduler = Scheduler(limits)

    def step(self) -> bool:
        """Computes one step; False if there was nothing to do.

        An engine that fails ends the requests of the step with finish reason "error"; others go on.
        """
        scheduler = self.scheduler
        step = scheduler.schedule()
        if not step:
            return False
        batch = pack([scheduled.piece for scheduled in step], scheduler.limits.page_size)
        try:
            logits = self.engine.forward(batch)
        except AngelForgeError as error:
            for scheduled in step:
                self.end(scheduled.request, str(error))
            return True
        requests = scheduler.advance(step)
        if requests:
            for request, token in zip(requests, sample(logits, requests).tolist(), strict=True):
                if token < 0:
                    self.end(request, _NO_TOKEN)
                    continue
                request.accept(token)
                if request.finished:
                    scheduler.remove(request)
        return True

    def end(self, request: Request, error: str | None = None) -> None:
        """Ends a request at once and frees its pages: cancelled, or failed where there is an `error`."""
        self.scheduler.remove(request)
        request.end("cancelled" if error is None else "error", error)
