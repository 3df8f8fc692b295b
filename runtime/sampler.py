"""The next token of every request of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from angelforge.runtime.batch import Float32, Int64
from angelforge.runtime.sampling import Float64, SamplingParams, candidates


class Drawing(Protocol):
    """What the sampler needs to know of a request."""

    params: SamplingParams
    rng: np.random.Generator  # the request's own: what else runs does not move it

    @property
    def known(self) -> Int64:
        """Ids of prompt and output so far, int64 [m]."""


def sample(logits: Float32, requests: Sequence[Drawing]) -> Int64:
    """One token id for each request, int64 [R], from its row of `logits` f32 [R, vocab].

    −1 where nothing can come: the row has no finite largest logit. A row's result depends on its request alone.
    """
    ids = logits.argmax(axis=1)
    for row, request in enumerate(requests):
        params = request.params
        if params.greedy and params.repetition_penalty == 1.0:
            if not np.isfinite(logits[row, ids[row]]):
                ids[row] = -1
        else:
            ids[row] = _draw(logits[row], request)
    return ids


def draw(ids: Int64, weights: Float64, rng: np.random.Generator) -> int:
    """One of `ids` [n] with probability proportional to `weights` [n]; one without weight is never drawn."""
    sums = np.cumsum(weights)
    # random() is at most 1 − 2⁻⁵³, so the product is below the last sum also when rounded, and the search ends at a
    # token with a probability above zero.
    return int(ids[np.searchsorted(sums, rng.random() * sums[-1], side="right")])


def _draw(logits: Float32, request: Drawing) -> int:
    ids, probabilities = candidates(logits, request.params, request.known)
    if ids.shape[0] < 2:
        return int(ids[0]) if ids.shape[0] else -1
    return draw(ids, probabilities, request.rng)
