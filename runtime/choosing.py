"""From a step's logits to the tokens of its requests: logprobs of prompts, checks of proposals, samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Float32, Int64
from angelforge.runtime.logprobs import TokenLogprob, row_logprob
from angelforge.runtime.request import Request
from angelforge.runtime.sampler import is_argmax, sample
from angelforge.runtime.scheduler import Scheduled
from angelforge.runtime.speculation import Speculator
from angelforge.runtime.verification import judge

if TYPE_CHECKING:
    from angelforge.runtime.device_sampling import DeviceSampler
    from angelforge.runtime.engines import Engine

_NO_TOKEN = (
    "The engine computed no finite logits, so no token could be chosen. Check the weights with `inspect --verify`."
)


Draw = Callable[[Float32, Sequence[Request]], Int64]
Logprob = Callable[[int, int, int], TokenLogprob]  # of a row's token, with so many of the likeliest


@dataclass(slots=True)
class _Run:
    """A request of a step whose rows from `first` on give tokens: of each proposal, and after them."""

    scheduled: Scheduled
    first: int
    tokens: Sequence[int] | None = None  # of the rows, where none depends on what the ones before give

    @property
    def count(self) -> int:
        """Rows."""
        return 1 + len(self.scheduled.proposed)

    @property
    def plain(self) -> bool:
        """Whether no row depends on what the ones before give."""
        return not self.scheduled.proposed or is_argmax(self.scheduled.request)


@dataclass(slots=True)
class _Made:
    """What a step of the engine made."""

    logits: Any
    speculator: Speculator | None
    logprob: Logprob


class Chooser:
    """Gives each request of a computed step what its rows of logits say, one token after another.

    Logits are NumPy arrays or torch tensors; beside the latter it keeps, on their device, what was seen of requests.
    """

    def __init__(self, draw: Draw = sample, sampler: DeviceSampler | None = None) -> None:
        """`draw` takes tokens from logits on the host, `sampler` from those on a device; a benchmark times them."""
        self._draw = draw
        self._sampler = sampler

    @classmethod
    def beside(cls, engine: Engine) -> Chooser:
        """For an engine's logits. Where they stay on a device, what chooses there is made ready now.

        Raises AngelForgeError where that fails.
        """
        device = getattr(engine, "logits_device", None)  # of those whose logits stay there
        if device is None:
            return cls()
        from angelforge.runtime.device_sampling import DeviceSampler  # it needs torch

        sampler = DeviceSampler(device)
        sampler.work.prepare(engine.config.vocab_size, device)
        return cls(sampler=sampler)

    def choose(self, step: Sequence[Scheduled], logits: Any, speculator: Speculator | None) -> None:
        """Of `logits` f32 [R, vocab]. A request that cannot go on ends with an error; others are unharmed.

        Raises AngelForgeError where a device fails in this or earlier work.
        """
        runs, scoring, begin = [], [], 0
        for scheduled in step:
            if scheduled.scoring:
                scoring.append((scheduled, begin))
            if scheduled.wants and not scheduled.request.finished:
                runs.append(_Run(scheduled, begin + scheduled.scoring))
            begin += scheduled.piece.logits
        if isinstance(logits, np.ndarray):
            logprob = self._look(runs, scoring, logits, begin)
        else:
            logprob = self._look_on_device(runs, scoring, logits)
        made = _Made(logits, speculator, logprob)
        for run in runs:
            if not run.scheduled.request.finished:
                (_judge_run if run.tokens is None else _accept_run)(run, made)

    def _look(
        self, runs: Sequence[_Run], scoring: Sequence[tuple[Scheduled, int]], logits: Float32, rows: int
    ) -> Logprob:
        """Scores prompts, and draws what depends on no other row; logprobs of the rest are looked up when needed."""

        def logprob(row: int, token: int, count: int) -> TokenLogprob:
            return row_logprob(logits[row], token, count)

        for scheduled, begin in scoring:
            _score(scheduled, [(begin + place, token) for place, token in enumerate(_to_score(scheduled))], logprob)
        _end_scored(runs)
        # Most rows give their token whatever the rows before say: those are sampled together.
        plain = [run for run in runs if run.plain and not run.scheduled.request.finished]
        chosen = [row for run in plain for row in range(run.first, run.first + run.count)]
        asked = [run.scheduled.request for run in plain for _ in range(run.count)]
        tokens = self._draw(logits if len(chosen) == rows else logits[chosen], asked).tolist() if chosen else []
        _deal(plain, tokens)
        return logprob

    def _look_on_device(self, runs: Sequence[_Run], scoring: Sequence[tuple[Scheduled, int]], logits: Any) -> Logprob:
        """The same for logits on a device: every row gives a token, as if the proposals before it had come out.

        A proposal passes if it is the token of its row: whatever is proposed, the tokens are drawn from p. Proposals
        there are the likeliest ones (`proposals.py`), and with all of q on one token this is speculative sampling.
        """
        from angelforge.runtime.device_adjusting import places_of  # they need torch
        from angelforge.runtime.device_round import Scored
        from angelforge.runtime.device_sampling import DeviceSampler

        if self._sampler is None:
            self._sampler = DeviceSampler(logits.device)
        scores = {
            id(scheduled): [
                Scored(begin + place, token, scheduled.request.params.prompt_logprobs or 0)
                for place, token in enumerate(_to_score(scheduled))
            ]
            for scheduled, begin in scoring
        }
        going = [run for run in runs if not _is_scored_out(run)]
        draws = [
            place for run in going for place in places_of(run.first, run.scheduled.request, run.scheduled.proposed)
        ]
        answer = self._sampler.answer(logits, draws, [one for each in scores.values() for one in each])
        for scheduled, _ in scoring:
            _score(scheduled, [(one.row, one.token) for one in scores[id(scheduled)]], answer.logprob)
        _end_scored(runs)
        _deal(going, answer.tokens.tolist())
        return answer.logprob


def _to_score(scheduled: Scheduled) -> list[int]:
    """The tokens of the prompt whose logprobs a step's first rows of a request tell."""
    request = scheduled.request
    count = min(scheduled.scoring, request.prompt_length - 1 - request.scored)
    tokens: list[int] = request.tokens[request.scored + 1 : request.scored + 1 + count].tolist()
    return tokens


def _score(scheduled: Scheduled, known: Sequence[tuple[int, int]], logprob: Logprob) -> None:
    """Notes the logprobs of a prompt's tokens: (row, token) of each."""
    request = scheduled.request
    try:
        request.score([logprob(row, token, request.params.prompt_logprobs or 0) for row, token in known])
    except AngelForgeError as error:
        request.end("error", str(error))


def _is_scored_out(run: _Run) -> bool:
    """Whether nothing but the prompt's logprobs was asked for."""
    return run.scheduled.request.length == run.scheduled.request.max_length


def _end_scored(runs: Sequence[_Run]) -> None:
    for run in runs:
        if _is_scored_out(run):
            run.scheduled.request.end("length")


def _deal(runs: Sequence[_Run], tokens: Sequence[int]) -> None:
    begin = 0
    for run in runs:
        run.tokens = tokens[begin : begin + run.count]
        begin += run.count


def _accept_run(run: _Run, made: _Made) -> None:
    """The tokens of a request's rows as far as its proposals agree with them."""
    proposed = run.scheduled.proposed
    for place, token in enumerate(run.tokens or ()):
        passed = place < len(proposed) and token == proposed[place]
        if not _accept(run, place, token, passed, made):
            return


def _judge_run(run: _Run, made: _Made) -> None:
    """The proposals in their order as far as the target lets them pass, and then a token of its own."""
    assert made.speculator is not None
    scheduled, first = run.scheduled, run.first
    request, logits = scheduled.request, made.logits
    for place, proposal in enumerate(scheduled.proposed):
        token = judge(logits[first + place], request, proposal, made.speculator.shares(request, place))
        if not _accept(run, place, token, token == proposal, made):
            return
    place = len(scheduled.proposed)
    _accept(run, place, int(sample(logits[first + place : first + place + 1], [request])[0]), False, made)


def _accept(run: _Run, place: int, token: int, passed: bool, made: _Made) -> bool:
    """Takes the token at `place` of a run; whether the next place counts."""
    request = run.scheduled.request
    if place < len(run.scheduled.proposed):
        assert made.speculator is not None
        made.speculator.judged(request, place, passed)
        request.computed += passed
    if token < 0:
        request.end("error", _NO_TOKEN)
        return False
    count = request.params.logprobs
    try:
        request.accept(token, None if count is None else made.logprob(run.first + place, token, count))
    except AngelForgeError as error:  # of a constraint
        request.end("error", str(error))
    return passed and not request.finished
