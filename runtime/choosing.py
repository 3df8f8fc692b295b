"""From a step's logits to the tokens of its requests: logprobs of prompts, checks of proposals, samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Float32, Int64
from angelforge.runtime.logprobs import row_logprobs
from angelforge.runtime.request import Request
from angelforge.runtime.sampler import is_argmax, sample
from angelforge.runtime.scheduler import Scheduled
from angelforge.runtime.speculation import Speculator
from angelforge.runtime.verification import judge

_NO_TOKEN = (
    "The engine computed no finite logits, so no token could be chosen. Check the weights with `inspect --verify`."
)


Draw = Callable[[Any, Sequence[Request]], Int64]


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
    if rows:
        tokens = iter(draw(logits if len(rows) == begin else logits[rows], drawing).tolist())
    for scheduled, first in chosen:
        if _is_plain(scheduled):
            following = [next(tokens) for _ in range(1 + len(scheduled.proposed))]
            _accept_run(scheduled, following, logits, first, speculator)
        else:
            _judge_run(scheduled, logits, first, speculator)


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


def _accept_run(
    scheduled: Scheduled, tokens: list[int], logits: Any, first: int, speculator: Speculator | None
) -> None:
    """The tokens of a request's rows as far as its proposals agree with them."""
    for place, token in enumerate(tokens):
        passed = place < len(scheduled.proposed) and token == scheduled.proposed[place]
        if not _accept(scheduled, place, token, passed, logits, first, speculator):
            return


def _judge_run(scheduled: Scheduled, logits: Any, first: int, speculator: Speculator | None) -> None:
    """The proposals in their order as far as the target lets them pass, and then a token of its own."""
    assert speculator is not None
    request = scheduled.request
    for place, proposal in enumerate(scheduled.proposed):
        token = judge(_on_host(logits[first + place]), request, proposal, speculator.shares(request, place))
        if not _accept(scheduled, place, token, token == proposal, logits, first, speculator):
            return
    place = len(scheduled.proposed)
    token = int(sample(logits[first + place : first + place + 1], [request])[0])
    _accept(scheduled, place, token, False, logits, first, speculator)


def _accept(
    scheduled: Scheduled, place: int, token: int, passed: bool, logits: Any, first: int, speculator: Speculator | None
) -> bool:
    """Takes the token at `place` of a run whose rows begin at `first`; whether the next place counts."""
    request = scheduled.request
    if place < len(scheduled.proposed):
        assert speculator is not None
        speculator.judged(request, place, passed)
        request.computed += passed
    if token < 0:
        request.end("error", _NO_TOKEN)
        return False
    count, row = request.params.logprobs, first + place
    try:
        request.accept(token, None if count is None else row_logprobs(logits[row : row + 1], [token], count)[0])
    except AngelForgeError as error:  # of a constraint
        request.end("error", str(error))
    return passed and not request.finished


def _on_host(row: Any) -> Float32:
    return row if isinstance(row, np.ndarray) else np.asarray(row.cpu().numpy())
