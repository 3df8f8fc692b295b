"""What a draft proposes at one place of a chain: its likeliest token, or one drawn as the request asks for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from angelforge.runtime.batch import Bool, Float32, Int64
from angelforge.runtime.distribution import adjust, choices
from angelforge.runtime.engines import DraftEngine
from angelforge.runtime.history import History
from angelforge.runtime.sampler import Drawing, draw, is_argmax
from angelforge.runtime.verification import Shares


@dataclass(frozen=True, eq=False)
class _Named:
    """A history in the draft's numbering."""

    ids: Int64
    counts: Float32


class Proposer:
    """Chooses proposals from the draft's last call under the same rules as the target's tokens are chosen."""

    def __init__(self, draft: DraftEngine) -> None:
        self._draft = draft
        vocabulary = draft.vocabulary  # target id of each draft token
        self._names = np.full(int(vocabulary.max()) + 1, -1)  # draft token of each target id, −1 for none
        self._names[vocabulary] = np.arange(vocabulary.shape[0])

    def choose(self, row: int, likeliest: int, request: Drawing, chain: list[int]) -> tuple[int, Shares | None]:
        """A token for the last call's row, and the distribution it was drawn from (None: it is the greedy choice).

        `likeliest` is the draft's first choice; prompt, output and `chain` stand before the token.
        """
        if is_argmax(request):
            return likeliest, None
        found, probabilities = choices(self._adjusted(self._draft.logits()[row], request, chain), request.params)
        if found.shape[0] == 0:  # no finite logits: any token will do, for the target checks it
            return likeliest, None
        ids = self._draft.vocabulary[found]
        if request.params.greedy:
            return int(ids[0]), None
        return draw(ids, probabilities, request.rng), Shares(ids, probabilities)

    def _adjusted(self, logits: Float32, request: Drawing, chain: list[int]) -> Float32:
        """The draft's logits after bias and penalties, of what the chain says too."""
        params, history = request.params, request.history
        if not params.logit_bias and not params.penalizes:
            return logits
        changed = logits.copy()
        known, names = self._names_of(params.bias.ids)
        seen = None if history is None else self._named(history, chain)
        adjust(changed, params, names, params.bias.values_f32[known], seen)
        return changed

    def _named(self, history: History, chain: list[int]) -> _Named:
        for token in chain:
            history.add(token)
        known, names = self._names_of(history.ids)
        seen = _Named(names, history.counts[known])
        for token in reversed(chain):
            history.take_back(token)
        return seen

    def _names_of(self, ids: Int64) -> tuple[Bool, Int64]:
        """Which of the target's `ids` [m] the draft knows, and its tokens for those."""
        names = np.where(ids < self._names.shape[0], self._names[np.minimum(ids, self._names.shape[0] - 1)], -1)
        known = names >= 0
        return known, names[known]
