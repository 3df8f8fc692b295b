"""Speculation: after every step of the target a draft proposes what the next step checks (one chain a request)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Int32, Int64
from angelforge.runtime.depth import Acceptance, Depth, check_depth
from angelforge.runtime.engines import DraftEngine
from angelforge.runtime.limits import Limits
from angelforge.runtime.packing import Piece, pack
from angelforge.runtime.proposals import Proposer
from angelforge.runtime.request import Request
from angelforge.runtime.scheduler import Scheduled
from angelforge.runtime.tally import Tally
from angelforge.runtime.verification import Shares


@dataclass(eq=False)
class _Drafted:
    """A request as the draft sees it."""

    request: Request
    acceptance: Acceptance
    tally: Tally
    depth: int = 0  # of the chain in the making
    chain: list[int] = field(default_factory=list)
    shares: list[Shares | None] = field(default_factory=list)  # that the tokens of the chain were drawn from


class Speculator:
    """Keeps a draft in step with the target and lets it propose.

    The draft's entry at position i needs token i + 1 and the target's state at i. After a step of the target both are
    known for every position that it computed for good, so one call of the draft follows each call of the target, for
    prompts and accepted runs alike, and the draft is never behind. What it writes while it proposes stands at positions
    that a later call writes anew before anything reads them.
    """

    def __init__(self, draft: DraftEngine, limits: Limits, depth: Depth) -> None:
        """Raises UsageError for a depth that the draft or the size of a step does not allow.

        A draft whose pool does not have the target's pages, which a sequence holds in both, is an AngelForgeError.
        """
        if draft.page_size != limits.page_size or draft.num_pages < limits.num_pages:
            raise AngelForgeError(
                f"The draft's cache has {draft.num_pages} pages of {draft.page_size} tokens, but the target's has "
                f"{limits.num_pages} of {limits.page_size}, and sequences hold the same pages in both."
            )
        size = min(limits.max_tokens_per_step, limits.max_rows or limits.max_tokens_per_step)
        fitting = size // limits.max_batch - 1
        limited_by = "the draft's limit" if draft.max_depth <= fitting else "tokens or rows per step / batch − 1"
        self.most = min(draft.max_depth, fitting)  # tokens proposed at a time
        self._depth = check_depth(depth, self.most, limited_by)
        self._draft = draft
        self._limits = limits
        self._proposer = Proposer(draft)
        self._drafted: dict[Request, _Drafted] = {}
        self.total = Tally()

    def shares(self, request: Request, place: int) -> Shares | None:
        """The distribution that a request's proposal was drawn from, None where it is a greedy one."""
        return self._drafted[request].shares[place]

    def checking(self, wanting: Sequence[Scheduled], seconds: float) -> None:
        """Notes that a step of the target, `seconds` long, has logits for the proposals of `wanting`."""
        self.total.target_calls += 1
        self.total.verify_seconds += seconds if any(scheduled.proposed for scheduled in wanting) else 0.0
        for scheduled in wanting:
            drafted = self._drafted.get(scheduled.request) or self._begin(scheduled.request)
            drafted.tally.target_calls += 1
            drafted.tally.verify_seconds += seconds if scheduled.proposed else 0.0
            for tally in (drafted.tally, self.total):
                tally.add_round(len(scheduled.proposed))

    def judged(self, request: Request, place: int, passed: bool) -> None:
        """Notes that a request's proposal at `place` of its chain passed or did not."""
        drafted = self._drafted[request]
        drafted.acceptance.add(place, passed)
        if passed:
            drafted.tally.add_accepted(place)
            self.total.add_accepted(place)

    def propose(self, step: Sequence[Scheduled]) -> None:
        """After a step of the target: brings the draft up to date and sets `proposed` of the requests that decode.

        Raises AngelForgeError if the draft's engine fails.
        """
        joining = self._joining(step)
        if not joining:
            return
        begin = perf_counter()
        likeliest = self._follow(step, joining)
        going = [drafted for drafted in joining if drafted.depth]
        while going:
            chosen = self._proposer.choose_all(likeliest, [(drafted.request, drafted.chain) for drafted in going])
            for drafted, (token, shares) in zip(going, chosen, strict=True):
                drafted.chain.append(token)
                drafted.shares.append(shares)
            # The deepest come first: those that go on are the first rows of what the draft has just handed on.
            going = [drafted for drafted in going if len(drafted.chain) < drafted.depth]
            if going:
                likeliest = self._draft.extend(pack([self._next_piece(d) for d in going], self._limits.page_size))
        seconds = perf_counter() - begin
        self.total.draft_seconds += seconds
        for drafted in joining:
            drafted.request.proposed = tuple(drafted.chain)
            drafted.tally.draft_seconds += seconds

    def forget(self, request: Request) -> None:
        """Forgets a request that has ended; unknown ones are ignored."""
        self._drafted.pop(request, None)

    def _joining(self, step: Sequence[Scheduled]) -> list[_Drafted]:
        """The requests of a step that go on with a draft, those with the deepest chain first."""
        joining = []
        for scheduled in step:
            request = scheduled.request
            if request.finished:
                continue
            drafted = self._drafted.get(request) or self._begin(request)
            if scheduled.wants:  # else it was set back, and what was proposed before is checked when it is there again
                request.proposed, drafted.chain, drafted.shares = (), [], []
            constrained = request.constraint is not None
            if drafted.acceptance.hopeless or (constrained and scheduled.piece.start >= request.prompt_length):
                continue  # given up for good: the draft falls behind
            # The last token of an output comes from the target's own row.
            room = request.max_length - request.length - 1
            wanted = drafted.acceptance.next_depth(request.length)
            drafted.depth = min(wanted, room) if scheduled.wants and not constrained else 0
            joining.append(drafted)
        return sorted(joining, key=lambda drafted: -drafted.depth)

    def _begin(self, request: Request) -> _Drafted:
        request.tally = Tally()
        self._drafted[request] = _Drafted(request, Acceptance(self._depth, self.most), request.tally)
        return self._drafted[request]

    def _follow(self, step: Sequence[Scheduled], joining: Sequence[_Drafted]) -> Int64:
        """The draft's call on the states that the target has just computed; the likeliest token of each row."""
        row, pieces, begin = {}, {}, 0
        for scheduled in step:
            row[scheduled.request], pieces[scheduled.request] = begin, scheduled.piece
            begin += scheduled.piece.tokens.shape[0]
        packed, rows = [], []
        for drafted in joining:
            request = drafted.request
            start, stop = pieces[request].start, request.computed  # without what the target rejected
            tokens = request.tokens[start + 1 : stop + 1]
            packed.append(Piece(tokens, start, _pages(request), int(drafted.depth > 0)))
            request.covered = stop
            rows.append(np.arange(row[request], row[request] + stop - start))
        return self._draft.follow(pack(packed, self._limits.page_size), np.concatenate(rows))

    def _next_piece(self, drafted: _Drafted) -> Piece:
        """The last token of a chain, to be followed by another."""
        start = drafted.request.computed + len(drafted.chain) - 1
        return Piece(np.array(drafted.chain[-1:], np.int64), start, _pages(drafted.request), 1)


def _pages(request: Request) -> Int32:
    """A running request's pages, which are as many as its chain needs: the draft's pool has the target's pages."""
    assert request.lease is not None
    return request.lease.pages
