"""Which of a draft's proposals the target lets pass: speculative sampling without a change of the distribution.

Leviathan et al. 2023 (arXiv 2211.17192, section 2.3): a token drawn from q is accepted with probability min(1, p / q);
after a rejection the token is drawn from max(p − q, 0), normalised. p and q are the *processed* distributions, after
bias, penalties, temperature, top-k, top-p and min-p, so that what comes out has the distribution of plain sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from angelforge.runtime.batch import Float32, Int64
from angelforge.runtime.distribution import Float64, candidates
from angelforge.runtime.sampler import Drawing, draw, mask_of


@dataclass(frozen=True, eq=False)
class Shares:
    """The distribution that a proposal was drawn from: ids of the target, each once, and their probabilities."""

    ids: Int64  # [n]
    probabilities: Float64  # [n], summing to 1

    def of(self, ids: Int64) -> Float64:
        """The probability of each of `ids` [m], 0 for those that are not among them."""
        order = np.argsort(self.ids)
        ordered = self.ids[order]
        places = np.minimum(np.searchsorted(ordered, ids), len(ordered) - 1)
        return np.where(ordered[places] == ids, self.probabilities[order][places], 0.0)


def judge(logits: Float32, request: Drawing, proposal: int, shares: Shares | None) -> int:
    """The token that follows, `proposal` itself if the target lets it pass.

    `logits` f32 [vocab] are the target's at this place, `request` knows everything before it. Without `shares` the
    proposal is a greedy one. −1 where nothing can come: the row has no finite largest logit.
    """
    ids, probabilities = candidates(logits, request.params, request.history, mask_of(request))
    if ids.shape[0] < 2:
        return int(ids[0]) if ids.shape[0] else -1
    if shares is None:  # the whole probability of q lies on the proposal
        shares = Shares(np.array([proposal]), np.ones(1))
    wanted = float(probabilities[ids == proposal].sum())
    if request.rng.random() * float(shares.of(np.array([proposal]))[0]) < wanted:
        return proposal
    rest = np.maximum(probabilities - shares.of(ids), 0.0)
    # Where p = q a rejection has no probability, but rounding may say otherwise: then nothing is left to draw from.
    return draw(ids, rest if rest.any() else probabilities, request.rng)
