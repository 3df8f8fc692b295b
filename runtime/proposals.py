"""What a draft proposes at one place of a chain: its likeliest token, or one drawn as the request asks for.

Whatever is proposed, the target's distribution comes out. Where the draft's logits are on a device its likeliest tokens
are proposed, which the draft's call has given already: no logits and no histories cross, and the target's check is a
draw (`Chooser`). On the host, where logits are at hand, a proposal that is drawn passes a little more often.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from angelforge.runtime.batch import Bool, Float32, Int64
from angelforge.runtime.distribution import Float64, adjust, choices
from angelforge.runtime.engines import DraftEngine
from angelforge.runtime.history import History, Seen
from angelforge.runtime.sampler import Drawing, draw, is_argmax
from angelforge.runtime.verification import Shares


class Proposer:
    """Chooses proposals from the draft's last call, on the host by the rules that the target's tokens are chosen by."""

    def __init__(self, draft: DraftEngine) -> None:
        self._draft = draft
        vocabulary = draft.vocabulary  # target id of each draft token
        self._names = np.full(int(vocabulary.max()) + 1, -1)  # draft token of each target id, −1 for none
        self._names[vocabulary] = np.arange(vocabulary.shape[0])

    def choose_all(
        self, likeliest: Int64, asked: Sequence[tuple[Drawing, list[int]]]
    ) -> list[tuple[int, Shares | None]]:
        """For each row of the draft's last call a token, and the distribution it was drawn from (None: it is greedy).

        `likeliest` int64 [≥ n] are the draft's first choices; `asked` are the rows' requests and the chains that stand
        between their outputs and the token. Raises AngelForgeError if the draft's engine fails.
        """
        chosen: list[tuple[int, Shares | None]] = [(int(token), None) for token in likeliest[: len(asked)]]
        ruled = [row for row, (request, _) in enumerate(asked) if not is_argmax(request)]
        if ruled and isinstance(logits := self._draft.logits(), np.ndarray):
            for row in ruled:
                request, chain = asked[row]
                found = choices(self._adjusted(logits[row], request, chain), request.params)
                chosen[row] = self._choose(chosen[row][0], request, found)
        return chosen

    def _choose(self, likeliest: int, request: Drawing, found: tuple[Int64, Float64]) -> tuple[int, Shares | None]:
        names, probabilities = found
        if names.shape[0] == 0:  # no finite logits: any token will do, for the target checks it
            return likeliest, None
        ids = self._draft.vocabulary[names]
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

    def _named(self, history: History, chain: list[int]) -> Seen:
        for token in chain:
            history.add(token)
        known, names = self._names_of(history.ids)
        seen = Seen(names, history.counts[known])
        for token in reversed(chain):
            history.take_back(token)
        return seen

    def _names_of(self, ids: Int64) -> tuple[Bool, Int64]:
        """Which of the target's `ids` [m] the draft knows, and its tokens for those."""
        names = np.where(ids < self._names.shape[0], self._names[np.minimum(ids, self._names.shape[0] - 1)], -1)
        known = names >= 0
        return known, names[known]
