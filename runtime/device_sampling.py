"""What a step's rows of logits give, chosen where the logits are: one copy there, one copy back.

What requests ask for goes to the device in one copy. What comes back depends on their rules: the largest logit's id,
the few largest logits (rules are applied to these on the host), an id that was drawn from the whole vocabulary, and
what logprobs need; all of it in one copy, which is the only thing that is waited for. A second round is needed only
where more than the few largest logits can come.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import numpy as np
import torch

from angelforge.runtime.batch import Int64
from angelforge.runtime.device import explained_gpu
from angelforge.runtime.device_adjusting import Place, Standing
from angelforge.runtime.device_history import DeviceHistories
from angelforge.runtime.device_largest import RowRules, ids_of
from angelforge.runtime.device_logprobs import told
from angelforge.runtime.device_round import Round, Scored
from angelforge.runtime.device_transfer import Packed
from angelforge.runtime.logprobs import TokenLogprob, row_logprobs
from angelforge.runtime.sampling import SamplingParams


class DeviceSampler:
    """Chooses tokens on one device for requests that come and go, and keeps there what was seen of them.

    The distribution is that of `sampler.sample` on the host; so are the tokens of requests with a seed and a top-k. A
    row's result depends on its request alone.
    """

    def __init__(self, device: torch.device) -> None:
        """Raises AngelForgeError where the device fails in this or earlier work."""
        self.device = device
        with explained_gpu():
            self.histories = DeviceHistories(device)
        self._packed: Packed | None = None  # of the last round, as the next two
        self._params: list[SamplingParams] = []
        self._rules: tuple[int, RowRules] | None = None  # and what they are as arrays
        self._standing = Standing((0, 0), ())

    def answer(
        self,
        logits: torch.Tensor,
        draws: Sequence[Place],
        scored: Sequence[Scored] = (),
    ) -> Answer:
        """What places give in rows of `logits` f32 [R, vocab]: tokens, and logprobs where they ask for any.

        Raises AngelForgeError where the device fails in this or earlier work.
        """
        round_ = Round(logits.shape, draws, scored)
        with explained_gpu():  # a launch too tells of a lack of memory, or of what failed before it
            packed = self.prepare(round_)
            found = round_.compute(logits, packed, self.histories).fetch()
            return Answer(round_, found, logits, round_.settle(found))

    def prepare(self, round_: Round) -> Packed:
        """Sends what the device has to know for a round."""
        packed = Packed(self.device, self._packed)
        if not self._standing.holds(round_.shape, places := round_.adjusted):
            self._standing = Standing(round_.shape, places)
        round_.pack(packed, self.histories, self._rules_of(round_), self._standing)
        packed.send()
        self._packed = packed
        return packed

    def _rules_of(self, round_: Round) -> RowRules | None:
        """The rules of the places whose largest logits are looked at: the same requests often ask again."""
        params, vocab = [place.params for place in round_.looked], round_.shape[1]
        if not params:
            return None
        known = self._rules
        if (
            known is None
            or known[0] != vocab
            or len(params) != len(self._params)
            or not all(map(is_, params, self._params))
        ):
            self._params, self._rules = params, (vocab, RowRules.of(params, vocab))
            known = self._rules
        return known[1]


class Answer:
    """What the places of a round gave."""

    def __init__(self, round_: Round, found: dict[str, Any], logits: torch.Tensor, tokens: Int64) -> None:
        self.tokens = tokens  # int64 [draws]; −1 where nothing can come: the row has no finite largest logit
        self._round, self._found, self._logits = round_, found, logits
        self._numbers = dict(zip(round_.measured, range(len(round_.measured)), strict=True))

    def logprob(self, row: int, token: int, count: int) -> TokenLogprob:
        """Of a token by a row, with the `count` likeliest; AngelForgeError where a row has no finite logits."""
        number, round_ = self._numbers.get(row), self._round
        if number is None or (
            number >= round_.single and (logit := self._logit(number - round_.single, token)) is None
        ):
            return self._by_itself(row, token, count)
        if number < round_.single:
            logit = float(self._found["one"][number, 0])
        assert logit is not None
        return told(self._found, number, token, logit, count)

    def _logit(self, number: int, token: int) -> float | None:
        """Of a token at a place whose largest logits were looked at; None where it is not among them."""
        round_ = self._round
        assert round_.rules is not None
        ids = ids_of(self._found["table"][round_.looked_asked[number]][None], round_.rules.width)[0]
        places = np.flatnonzero(ids == token)
        return float(self._found["few"][number, places[0]]) if places.shape[0] else None

    def _by_itself(self, row: int, token: int, count: int) -> TokenLogprob:
        """Of a row that needed a second round."""
        return row_logprobs(self._logits[row : row + 1], [token], count)[0]
