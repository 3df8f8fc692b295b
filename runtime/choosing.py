"""From a step's logits to the tokens of its requests: logprobs of prompts, checks of proposals, samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Int64
from angelforge.runtime.distribution import Float64
from angelforge.runtime.logprobs import TokenLogprob, row_logprobs
from angelforge.runtime.request import Request
from angelforge.runtime.sampler import draw as draw_from
from angelforge.runtime.sampler import is_argmax, sample
from angelforge.runtime.scheduler import Scheduled
from angelforge.runtime.speculation import Speculator
from angelforge.runtime.verification import judge, judge_among

_NO_TOKEN = (
    "The engine computed no finite logits, so no token could be chosen. Check the weights with `inspect --verify`."
)


Draw = Callable[[Any, Sequence[Request]], Int64]
Candidates = tuple[Int64, Float64]  # ids and their probabilities


@dataclass(slots=True)
class _Made:
    """What a step of the engine made, and what is known of it."""

    logits: Any
    speculator: Speculator | None
    told: Mapping[int, TokenLogprob]  # by row, of rows on a device whose token is known

    def logprob(self, row: int, token: int, count: int) -> TokenLogprob:
        """Of `token` by a row, with the `count` likeliest."""
        return self.told.get(row) or row_logprobs(self.logits[row : row + 1], [token], count)[0]


def choose_tokens(step: Sequence[Scheduled], logits: Any, speculator: Speculator | None, draw: Draw = sample) -> None:
    """Gives each request of a computed step what its rows of `logits` f32 [R, vocab] say, one token after another.

    `logits` is a NumPy array or a torch tensor, `draw` takes the tokens that depend on no others from it. A request
    that cannot go on ends with an error; others are unharmed.
    """
    begin, chosen = 0, []  # (scheduled, its first row that gives a token)
    for scheduled in step:
        if scheduled.scoring:
            _score(scheduled, logits[begin : begin + scheduled.scoring])
        request = scheduled.request
        if scheduled.wants and request.length == request.max_length:
            request.end("length")  # nothing but the prompt's logprobs was asked for
        if scheduled.wants and not request.finished:
            chosen.append((scheduled, begin + scheduled.scoring))
        begin += scheduled.piece.logits
    # Most rows give their token whatever the rows before say: those are sampled together.
    rows: list[int] = []
    drawing: list[Request] = []
    for scheduled, first in chosen:
        if _is_plain(scheduled):
            count = 1 + len(scheduled.proposed)
            rows += range(first, first + count)
            drawing += [scheduled.request] * count
    tokens = draw(logits if len(rows) == begin else logits[rows], drawing).tolist() if rows else []
    made = _Made(logits, speculator, _logprobs_on_device(logits, rows, tokens, drawing))
    following = iter(tokens)
    known = _candidates_on_device(logits, [one for one in chosen if not _is_plain(one[0])])
    for scheduled, first in chosen:
        if _is_plain(scheduled):
            _accept_run(scheduled, list(islice(following, 1 + len(scheduled.proposed))), made, first)
        else:
            _judge_run(scheduled, made, first, known.get(first))


def _logprobs_on_device(
    logits: Any, rows: Sequence[int], tokens: Sequence[int], requests: Sequence[Request]
) -> dict[int, TokenLogprob]:
    """By row: the logprobs that requests ask for, from logits on a device, as one piece of work for each number asked.

    Rows without a token are left out.
    """
    if isinstance(logits, np.ndarray):
        return {}  # nothing is gained before it is known which rows count
    asked: dict[int, list[tuple[int, int]]] = {}
    for row, token, request in zip(rows, tokens, requests, strict=True):
        if request.params.logprobs is not None and token >= 0:
            asked.setdefault(request.params.logprobs, []).append((row, token))
    told: dict[int, TokenLogprob] = {}
    for count, pairs in asked.items():
        places, chosen = [row for row, _ in pairs], [token for _, token in pairs]
        told.update(zip(places, row_logprobs(logits[places], chosen, count), strict=True))
    return told


def _candidates_on_device(logits: Any, judged: Sequence[tuple[Scheduled, int]]) -> dict[int, list[Candidates]]:
    """By first row: what can come at each place of the chains of `judged`, from logits on a device, all at once.

    A place counts only if all proposals before it pass, so that its history is known already.
    """
    if not judged or isinstance(logits, np.ndarray):
        return {}
    from angelforge.runtime.device_candidates import candidates_on_device, places_of  # needs torch

    runs = [places_of(first, scheduled.request, scheduled.proposed) for scheduled, first in judged]
    found = iter(candidates_on_device(logits, [place for run in runs for place in run]))
    return {first: [next(found) for _ in run] for (_, first), run in zip(judged, runs, strict=True)}


def _is_plain(scheduled: Scheduled) -> bool:
    return not scheduled.proposed or is_argmax(scheduled.request)


def _score(scheduled: Scheduled, logits: Any) -> None:
    request = scheduled.request
    count = min(scheduled.scoring, request.prompt_length - 1 - request.scored)
    tokens = request.tokens[request.scored + 1 : request.scored + 1 + count].tolist()
    try:
        request.score(row_logprobs(logits[:count], tokens, request.params.prompt_logprobs or 0))
    except AngelForgeError as error:
        request.end("error", str(error))


def _accept_run(scheduled: Scheduled, tokens: Sequence[int], made: _Made, first: int) -> None:
    """The tokens of a request's rows as far as its proposals agree with them."""
    for place, token in enumerate(tokens):
        passed = place < len(scheduled.proposed) and token == scheduled.proposed[place]
        if not _accept(scheduled, place, token, passed, made, first):
            return


def _judge_run(scheduled: Scheduled, made: _Made, first: int, known: Sequence[Candidates] | None) -> None:
    """The proposals in their order as far as the target lets them pass, and then a token of its own.

    `known` are the candidates at each place, where the logits are on a device.
    """
    assert made.speculator is not None
    request, logits = scheduled.request, made.logits
    for place, proposal in enumerate(scheduled.proposed):
        shares = made.speculator.shares(request, place)
        if known is None:
            token = judge(logits[first + place], request, proposal, shares)
        else:
            token = judge_among(*known[place], request, proposal, shares)
        if not _accept(scheduled, place, token, token == proposal, made, first):
            return
    place = len(scheduled.proposed)
    if known is None:
        token = int(sample(logits[first + place : first + place + 1], [request])[0])
    else:
        token = draw_from(*known[place], request.rng) if known[place][0].shape[0] else -1
    _accept(scheduled, place, token, False, made, first)


def _accept(scheduled: Scheduled, place: int, token: int, passed: bool, made: _Made, first: int) -> bool:
    """Takes the token at `place` of a run whose rows begin at `first`; whether the next place counts."""
    request = scheduled.request
    if place < len(scheduled.proposed):
        assert made.speculator is not None
        made.speculator.judged(request, place, passed)
        request.computed += passed
    if token < 0:
        request.end("error", _NO_TOKEN)
        return False
    count = request.params.logprobs
    try:
        request.accept(token, None if count is None else made.logprob(first + place, token, count))
    except AngelForgeError as error:  # of a constraint
        request.end("error", str(error))
    return passed and not request.finished
