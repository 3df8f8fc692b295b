"""What a draft proposes at one place of a chain: its likeliest token, or one drawn as the request asks for."""

from __future__ import annotations

import numpy as np

from angelforge.runtime.batch import Int64
from angelforge.runtime.engines import DraftEngine
from angelforge.runtime.sampler import Drawing, draw
from angelforge.runtime.sampling import candidates
from angelforge.runtime.verification import Shares


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
        params = request.params
        if params.greedy and params.repetition_penalty == 1.0:
            return likeliest, None
        history = self._names_of(np.concatenate([request.known, np.array(chain, np.int64)]))
        found, probabilities = candidates(self._draft.logits()[row], params, history)
        if found.shape[0] == 0:  # no finite logits: any token will do, for the target checks it
            return likeliest, None
        ids = self._draft.vocabulary[found]
        if params.greedy:
            return int(ids[0]), None
        return draw(ids, probabilities, request.rng), Shares(ids, probabilities)

    def _names_of(self, ids: Int64) -> Int64:
        """The draft's tokens for `ids` [m] of the target; those that it does not know are left out."""
        known: Int64 = self._names[ids[ids < self._names.shape[0]]]
        return known[known >= 0]
