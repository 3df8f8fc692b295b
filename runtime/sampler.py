"""The next token of every request of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from angelforge.runtime.batch import Float32, Int64
from angelforge.runtime.constraint import Constraint, UInt32
from angelforge.runtime.distribution import Float64, adjusted, kept
from angelforge.runtime.history import History
from angelforge.runtime.sampling import SamplingParams

_BLOCK = 1024  # ids whose running sum is taken at once: one over a whole vocabulary takes longer than its weights


class Drawing(Protocol):
    """What the sampler needs to know of a request."""

    params: SamplingParams
    rng: np.random.Generator  # the request's own: what else runs does not move it
    history: History | None  # of prompt and output so far, where something is penalised
    constraint: Constraint | None


class Ruled(Protocol):
    """What decides whether the largest logit is enough."""

    @property
    def params(self) -> SamplingParams:
        """Its rules."""

    @property
    def constraint(self) -> Constraint | None:
        """Its grammar."""


def sample(logits: Float32, requests: Sequence[Drawing]) -> Int64:
    """One token id for each request, int64 [R], from its row of `logits` f32 [R, vocab] on the host.

    −1 where nothing can come: the row has no finite largest logit. A row's result depends on its request alone: each
    token that is not greedy takes one number of the request's generator. On a device `DeviceSampler` does the same.
    """
    ids = np.empty(len(requests), np.int64)
    for row, request in enumerate(requests):
        values = logits[row]
        if not is_argmax(request):
            values = adjusted(values, request.params, request.history, mask_of(request))
        if request.params.greedy:
            best = int(values.argmax())
            ids[row] = best if np.isfinite(values[best]) else -1
        else:
            ids[row] = draw(*kept(values, request.params), request.rng)
    return ids


def is_argmax(request: Ruled) -> bool:
    """Whether a request always takes the largest of its raw logits."""
    params = request.params
    return params.greedy and not params.penalizes and not params.logit_bias and request.constraint is None


def mask_of(request: Drawing) -> UInt32 | None:
    """What the request's constraint allows next, None without one."""
    return None if request.constraint is None else request.constraint.mask()


def draw(ids: Int64, weights: Float32 | Float64, rng: np.random.Generator) -> int:
    """One of `ids` [n] with probability proportional to `weights` [n]; one without weight is never drawn. −1 for none.

    It is the first at which the running sum passes its part of the whole: that of blocks, then that of ids in one.
    """
    uniform = rng.random()
    if not ids.shape[0]:
        return -1
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, ids.shape[0], _BLOCK), dtype=np.float64))
    # random() is at most 1 − 2⁻⁵³, so the product is below the last sum also when rounded.
    mark = uniform * sums[-1]
    block = int(np.searchsorted(sums, mark, side="right"))
    begin = block * _BLOCK
    within = np.cumsum(weights[begin : begin + _BLOCK], dtype=np.float64)
    place = np.searchsorted(within, mark - (sums[block - 1] if block else 0.0), side="right")
    last = np.searchsorted(within, within[-1], side="left")  # with weight; a block's two sums may differ by a rounding
    return int(ids[begin + min(place, last)])
