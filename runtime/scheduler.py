"""Which tokens of which requests the next step computes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from angelforge.errors import UsageError
from angelforge.runtime.limits import Limits
from angelforge.runtime.packing import Piece
from angelforge.runtime.pages import Lease, PagePool
from angelforge.runtime.prefixes import PageKeys
from angelforge.runtime.request import Request

_SCORING_ROWS = 256  # rows of logits for logprobs of prompts in one step: 161 MB with the largest vocabulary


@dataclass(eq=False, slots=True)  # not frozen, as `Piece`
class Scheduled:
    """A request and its tokens in one step, the last of them those that a draft proposed."""

    request: Request
    piece: Piece
    proposed: tuple[int, ...] = ()
    scoring: int = 0  # rows of logits that tell logprobs of the prompt; they come first
    wants: bool = False  # whether the rows after those give tokens


@dataclass(slots=True)
class _Room:
    """What is left of a step."""

    tokens: int
    rows: float  # of logits


class Scheduler:
    """Continuous batching: decodes, proposals to check and chunks of prompts share every step.

    A step has up to `limits.max_tokens_per_step` tokens. Those that decode go first, then prompts in the order they
    came. Requests start in the order they came, each as soon as there are pages for what is known of it; nobody
    overtakes. Pages are taken as outputs grow. When none is left the youngest running request is set back: it goes to
    the front of the queue, keeps its output, proposals and random numbers, and what it had in the cache is computed
    again when it starts anew. The oldest is never set back for others, so that every request ends.
    """

    def __init__(self, limits: Limits, lookahead: int = 0, drafted: bool = False) -> None:
        """`lookahead` is how many tokens a draft may propose after a step, `drafted` whether there is one at all."""
        self.limits = limits
        self.pool = PagePool(limits.num_pages)
        self.waiting: OrderedDict[Request, None] = OrderedDict()  # the oldest first
        self.running: dict[Request, None] = {}  # the oldest first; all are older than those that wait
        self.set_back = 0  # how often a request was
        self._lookahead = lookahead
        self._drafted = drafted
        self._coming: dict[bytes, Request] = {}  # keys of pages that running requests are going to publish
        self._blocked: tuple[Request, int] | None = None  # the request that did not fit, and the pool's changes then

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
        request.keys = PageKeys(self.limits.page_size, self._drafted)
        self.waiting[request] = None

    def remove(self, request: Request) -> None:
        """Forgets a request, ended or not, and frees what it held; unknown ones are ignored."""
        self.waiting.pop(request, None)
        if request in self.running:
            del self.running[request]
            self._release(request)

    def schedule(self) -> list[Scheduled]:
        """The next step; empty if nothing waits or runs. The tokens count as computed once `advance` is called."""
        limits = self.limits
        room = _Room(limits.max_tokens_per_step, limits.max_rows or float("inf"))
        step: list[Scheduled] = []
        prompts = []
        for request in list(self.running):
            if request.lease is None:
                continue  # set back for the sake of an older one
            if request.length - request.computed > 1:
                prompts.append(request)
            elif self._grow(request):
                self._decode(request, room, step)
        for request in prompts:
            if request.lease is not None:
                self._take(request, room, step)
        while room.tokens > 0 and self.waiting and len(self.running) < limits.max_batch:
            request = next(iter(self.waiting))
            if not self._start(request):
                break
            del self.waiting[request]
            self.running[request] = None
            self._take(request, room, step)
        return step

    def advance(self, step: list[Scheduled]) -> list[Scheduled]:
        """Notes that a step was computed, but for proposals; returns what wants a token, in the order of its logits."""
        for scheduled in step:
            scheduled.request.computed += scheduled.piece.tokens.shape[0] - len(scheduled.proposed)
        return [scheduled for scheduled in step if scheduled.wants]

    def publish(self, request: Request) -> None:
        """Offers a running request's new full pages to others, with a draft those that the draft has filled too."""
        lease = request.lease
        done = min(request.computed, request.covered) if self._drafted else request.computed
        full = done // self.limits.page_size
        if lease is None or full <= lease.published:
            return
        keys = request.keys.of(request.known, full)
        for key in keys[lease.published :]:
            if self._coming.get(key) is request:
                del self._coming[key]
        lease.publish(keys)

    def _grow(self, request: Request) -> bool:
        """Gets the pages that a request needs until its next turn, if need be from the youngest; False: it was that."""
        assert request.lease is not None
        reach = self._reach(request)
        if reach <= request.lease.count * self.limits.page_size:
            return True
        pages = self.limits.pages_for(reach)
        while not request.lease.grow(pages):
            youngest = next(reversed(self.running))
            self._set_back(youngest)
            if youngest is request:
                return False
        return True

    def _reach(self, request: Request) -> int:
        """Positions that are written until a request's next turn, its draft's included."""
        return min(request.length + len(request.proposed) + self._lookahead, request.cache_length)

    def _set_back(self, request: Request) -> None:
        self._release(request)
        del self.running[request]
        request.computed = 0
        self.waiting[request] = None
        self.waiting.move_to_end(request, last=False)
        self.set_back += 1

    def _release(self, request: Request) -> None:
        assert request.lease is not None
        for key in request.keys.of(request.known, self._prompt_pages(request))[request.lease.published :]:
            if self._coming.get(key) is request:
                del self._coming[key]
        request.lease.release()
        request.lease = None

    def _prompt_pages(self, request: Request) -> int:
        """Pages that a prompt alone fills; what the first token of the output decides is not among them."""
        return (request.prompt_length - 1) // self.limits.page_size

    def _start(self, request: Request) -> bool:
        """Gives a request pages for all that is known of it, those that others have filled already where it can.

        The last known token is always computed, for its logits, and so are prompts whose logprobs are to be told.
        """
        if self._blocked == (request, self.pool.changes):
            return False
        page_size, pool = self.limits.page_size, self.pool
        usable = (request.length - 1) // page_size
        if request.scored < request.prompt_length - 1:
            usable = min(usable, request.scored // page_size)
        keys = request.keys.of(request.known, usable)
        shared = pool.match(keys)
        needed = self.limits.pages_for(self._reach(request)) - len(shared) + pool.unused(shared)
        # A page for each that runs, so that it is not set back by the first of them that grows.
        fits = needed + len(self.running) <= pool.free
        if not fits or (len(shared) < len(keys) and keys[len(shared)] in self._coming):
            # The second: a running request is about to fill the next page, so that it need not be computed twice.
            self._blocked = (request, pool.changes)
            return False
        request.lease = Lease(pool, self.limits.pages_for(request.cache_length))
        request.lease.share(shared)
        request.lease.grow(self.limits.pages_for(self._reach(request)))
        request.computed = request.covered = len(shared) * page_size
        if request.cached_tokens is None:
            request.cached_tokens = request.computed
        if request.length == request.prompt_length:
            for key in request.keys.of(request.known, self._prompt_pages(request))[len(shared) :]:
                self._coming.setdefault(key, request)
        return True

    def _decode(self, request: Request, room: _Room, step: list[Scheduled]) -> None:
        """Puts the last known token of a request and what is proposed after it into a step: there is room for those."""
        assert request.lease is not None
        begin, proposed = request.computed, request.proposed
        tokens = request.tokens[begin : begin + 1]
        if proposed:
            tokens = np.array([tokens[0], *proposed], np.int64)
        rows = 1 + len(proposed)
        room.tokens -= rows
        room.rows -= rows
        step.append(Scheduled(request, Piece(tokens, begin, request.lease.pages, rows), proposed, 0, True))

    def _take(self, request: Request, room: _Room, step: list[Scheduled]) -> None:
        """Puts known tokens of a running request, and what is proposed after them, into a step as far as there is room.

        Proposals come with the last known token only, all of them.
        """
        assert request.lease is not None
        begin, proposed = request.computed, request.proposed
        end = min(request.length, begin + room.tokens)
        unscored = request.prompt_length - 1 - request.scored
        if unscored > 0:
            end = min(end, request.scored + int(min(room.rows, _SCORING_ROWS)))
        if end == request.length and (
            end - begin + len(proposed) > room.tokens or (unscored <= 0 and 1 + len(proposed) > room.rows)
        ):
            end -= 1
        if end <= begin:
            return
        last = end == request.length
        tokens = request.tokens[begin:end]
        if not last:
            proposed = ()
        elif proposed:
            tokens = np.concatenate([tokens, np.array(proposed, np.int64)])
        scoring = max(0, min(end - request.scored, unscored)) if unscored > 0 else 0
        rows = scoring + (1 + len(proposed) if last else 0)
        room.tokens -= tokens.shape[0]
        room.rows -= rows
        step.append(Scheduled(request, Piece(tokens, begin, request.lease.pages, rows), proposed, scoring, last))
