"""Which tokens of which requests the next step computes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from angelforge.errors import UsageError
from angelforge.runtime.limits import Limits
from angelforge.runtime.packing import Piece
from angelforge.runtime.pages import PagePool
from angelforge.runtime.request import Request


@dataclass(frozen=True, eq=False)
class Scheduled:
    """A request and its tokens in one step, the last of them those that a draft proposed."""

    request: Request
    piece: Piece
    proposed: tuple[int, ...] = ()
    scoring: int = 0  # rows of logits that tell logprobs of the prompt; they come first
    wants: bool = False  # whether the rows after those give tokens


class Scheduler:
    """Continuous batching: decodes and chunks of prompts share every step, up to `limits.max_tokens_per_step` tokens.

    Requests start in the order they came, each as soon as the pages of its longest possible output can be promised to
    it: a running request never lacks a page. Those that decode go first, then prompts in the order they started.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pool = PagePool(limits.num_pages)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def check(self, request: Request) -> None:
        """Raises UsageError if the cache could not hold a request's longest output even alone."""
        if self.limits.pages_for(request.cache_length) > self.pool.capacity:
            raise UsageError(
                f"The prompt has {request.prompt_length} tokens and up to {request.max_length - request.prompt_length} "
                f"are to follow, but the KV cache holds {self.limits.cache_tokens} tokens. Ask for fewer tokens, or "
                "give the cache more memory."
            )

    def add(self, request: Request) -> None:
        """Queues a request; raises UsageError as `check`."""
        self.check(request)
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forgets a request, ended or not, and frees what it held; unknown ones are ignored."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        if request.lease is not None:
            request.lease.release()
            request.lease = None

    def schedule(self) -> list[Scheduled]:
        """The next step; empty if nothing waits or runs. The tokens count as computed once `advance` is called."""
        limits = self.limits
        budget = limits.max_tokens_per_step
        step, prompts = [], []
        for request in self.running:
            if request.length - request.computed > 1:
                prompts.append(request)
            else:
                step.append(self._take(request, 1))
                budget -= step[-1].piece.tokens.shape[0]
        for request in prompts:
            if budget == 0:
                return step
            step.append(self._take(request, budget))
            budget -= step[-1].piece.tokens.shape[0]
        while budget > 0 and self.waiting and len(self.running) < limits.max_batch:
            request = self.waiting[0]
            request.lease = self.pool.lease(limits.pages_for(request.cache_length))
            if request.lease is None:
                break
            self.running.append(self.waiting.popleft())
            step.append(self._take(request, budget))
            budget -= step[-1].piece.tokens.shape[0]
        return step

    def advance(self, step: list[Scheduled]) -> list[Scheduled]:
        """Notes that a step was computed, but for proposals; returns what wants a token, in the order of its logits."""
        for scheduled in step:
            known = scheduled.piece.tokens.shape[0] - len(scheduled.proposed)
            scheduled.request.computed += known
        return [scheduled for scheduled in step if scheduled.wants]

    def _take(self, request: Request, budget: int) -> Scheduled:
        """Up to `budget` known tokens of a running request and what is proposed after them, with pages to hold them."""
        assert request.lease is not None
        begin = request.computed
        end = min(request.length, begin + budget)
        tokens = request.tokens[begin:end]
        last = end == request.length
        proposed = request.proposed if last else ()
        scoring = max(0, min(end, request.prompt_length - 1) - max(begin, request.scored))
        if proposed:
            tokens = np.concatenate([tokens, np.array(proposed, np.int64)])
        request.lease.grow(self.limits.pages_for(end + len(proposed)))
        rows = scoring + (1 + len(proposed) if last else 0)
        return Scheduled(request, Piece(tokens, begin, request.lease.pages, rows), proposed, scoring, last)
