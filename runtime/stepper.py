"""The loop body of generation: schedule, pack, compute, choose tokens, hand out, and let a draft propose the next."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np

from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Float32
from angelforge.runtime.engines import Engine
from angelforge.runtime.limits import Limits
from angelforge.runtime.packing import pack
from angelforge.runtime.request import Request
from angelforge.runtime.sampler import sample
from angelforge.runtime.scheduler import Scheduled, Scheduler
from angelforge.runtime.speculation import Speculator
from angelforge.runtime.verification import judge

_NO_TOKEN = (
    "The engine computed no finite logits, so no token could be chosen. Check the weights with `inspect --verify`."
)


class Stepper:
    """Drives one engine for any number of requests; what they produce goes to each request's `outbox`."""

    def __init__(self, engine: Engine, limits: Limits, speculator: Speculator | None = None) -> None:
        self.engine = engine
        self.scheduler = Scheduler(limits)
        self.speculator = speculator

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
            self._choose(scheduler.advance(step), logits, seconds)
            if self.speculator is not None:
                self.speculator.propose(step)
        except AngelForgeError as error:
            for scheduled in step:
                self.end(scheduled.request, str(error))
            return True
        for scheduled in step:
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

    def _choose(self, wanting: Sequence[Scheduled], logits: Float32, seconds: float) -> None:
        """Gives each request of `wanting` its next tokens, from its rows of `logits` f32 [R, vocab], one by one."""
        if not wanting:
            return
        if self.speculator is not None:
            self.speculator.checking(wanting, seconds)
        if not any(scheduled.proposed for scheduled in wanting):
            tokens = sample(logits, [scheduled.request for scheduled in wanting])
            for scheduled, token in zip(wanting, tokens.tolist(), strict=True):
                self._accept(scheduled.request, token)
            return
        ends = np.cumsum([scheduled.piece.logits for scheduled in wanting])
        for scheduled, rows in zip(wanting, np.split(logits, ends[:-1]), strict=True):
            self._check(scheduled, rows)

    def _check(self, scheduled: Scheduled, logits: Float32) -> None:
        """The proposals in their order as far as the target lets them pass, and then a token of its own.

        `logits` f32 [1 + proposals, vocab].
        """
        request = scheduled.request
        for place, proposal in enumerate(scheduled.proposed):
            assert self.speculator is not None
            token = judge(logits[place], request, proposal, self.speculator.shares(request, place))
            passed = token == proposal
            self.speculator.judged(request, place, passed)
            request.computed += passed
            self._accept(request, token)
            if request.finished or not passed:
                return
        self._accept(request, int(sample(logits[-1:], [request])[0]))

    def _accept(self, request: Request, token: int) -> None:
        if token < 0:
            self.end(request, _NO_TOKEN)
        else:
            request.accept(token)
