"""The distribution that a request's rules make of a row of logits."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from angelforge.runtime.batch import Float32, Int64
from angelforge.runtime.constraint import UInt32, allowed_ids
from angelforge.runtime.history import Counted
from angelforge.runtime.sampling import SamplingParams
from angelforge.runtime.selection import top_ids

Float64 = npt.NDArray[np.float64]

_NUCLEUS_GUESS = 256  # tokens that top-p looks at first; it looks at 16 times as many until they hold enough
SMALLEST_DIVISOR = 1e-30  # a normal f32, so that a temperature below it does not become a division by zero
LARGEST_DIVISOR = 1e30  # nor one above it infinity, by which −inf makes no number


def candidates(
    logits: Float32, params: SamplingParams, history: Counted | None = None, mask: UInt32 | None = None
) -> tuple[Int64, Float64]:
    """The tokens that can come next and their probabilities: (ids [n] rising, probabilities [n], summing to 1).

    `logits` f32 [vocab] is not changed; `history` is of prompt and output so far, needed where something is penalised;
    `mask` is a constraint's. Ties are broken by the lower id. Without a finite largest logit (an engine gave NaN or
    infinity, a constraint allows nothing) nothing can come: n is 0.
    """
    return choices(adjusted(logits, params, history, mask), params)


def choices(logits: Float32, params: SamplingParams) -> tuple[Int64, Float64]:
    """The same for logits that are adjusted already: temperature, top-k, top-p and min-p."""
    ids, weights = kept(logits, params)
    return ids, weights / weights.sum(dtype=np.float64)


def kept(logits: Float32, params: SamplingParams) -> tuple[Int64, Float32]:
    """The same with weights f32 [n], relative to the best token's 1, instead of probabilities; not to be changed."""
    best = int(logits.argmax())
    peak = float(logits[best])  # not a number where any logit is none
    if not math.isfinite(peak):
        return np.empty(0, np.int64), np.empty(0, np.float32)
    if params.greedy:
        return np.array([best]), np.ones(1, np.float32)
    limited = 0 < params.top_k < logits.shape[0]
    if limited or params.top_p < 1:
        if limited:
            ids = top_ids(logits, params.top_k)
            weights = _weights(logits[ids], peak, params.temperature)
            keep = _nucleus(weights, float(weights.sum(dtype=np.float64)), params.top_p)
        else:
            ids, weights, keep = _nucleus_of_all(logits, peak, params)
        order = np.argsort(ids[:keep])  # they came by falling logits
        ids, weights = ids[order], weights[order]
    else:
        ids, weights = _all_ids(logits.shape[0]), _weights(logits, peak, params.temperature)
    if params.min_p > 0:
        likely = weights >= np.float64(params.min_p)  # the best token's weight is 1
        ids, weights = ids[likely], weights[likely]
    return ids, weights


def processed_distribution(
    logits: Float32, params: SamplingParams, history: Counted | None = None, mask: UInt32 | None = None
) -> Float64:
    """The same as a dense vector f64 [vocab]; all zero where nothing can come. Speculative sampling compares these."""
    ids, probabilities = candidates(logits, params, history, mask)
    dense = np.zeros(logits.shape[0])
    dense[ids] = probabilities
    return dense


def adjusted(
    logits: Float32, params: SamplingParams, history: Counted | None = None, mask: UInt32 | None = None
) -> Float32:
    """Logits after bias, penalties and mask; `logits` itself where nothing changes them.

    The repetition penalty is that of CTRL (arXiv:1909.05858) with the sign rule of Hugging Face Transformers; frequency
    and presence penalty are those of OpenAI's API and look at the output only.
    """
    if not params.logit_bias and not params.penalizes and mask is None:
        return logits
    changed = logits.copy()
    adjust(changed, params, params.bias.ids, params.bias.values_f32, history)
    if mask is not None:
        changed[~allowed_ids(mask, changed.shape[0])] = -np.inf
    return changed


def adjust(logits: Float32, params: SamplingParams, ids: Int64, values: Float32, history: Counted | None) -> None:
    """Adds `values` [n] to the logits of `ids` [n] and takes the penalties, in place."""
    logits[ids] += values
    if not params.penalizes:
        return
    assert history is not None
    seen, counts = logits[history.ids], history.counts
    if params.repetition_penalty != 1.0:
        penalty = np.float32(params.repetition_penalty)
        seen = np.where(seen > 0, seen / penalty, seen * penalty)
    if params.frequency_penalty != 0.0:
        seen -= np.float32(params.frequency_penalty) * counts
    if params.presence_penalty != 0.0:
        seen -= np.float32(params.presence_penalty) * (counts > 0)
    logits[history.ids] = seen


@lru_cache(maxsize=4)
def _all_ids(vocab: int) -> Int64:
    ids = np.arange(vocab)
    ids.flags.writeable = False
    return ids


def _weights(logits: Float32, peak: float, temperature: float) -> Float32:
    # exp of the scaled distance to the best, so at most 1: f32 is exact enough, sums over a vocabulary are taken in f64
    weights = logits - np.float32(peak)
    with np.errstate(over="ignore"):  # a tiny temperature makes the distance infinite and the weight 0, as it should
        weights /= np.float32(min(max(temperature, SMALLEST_DIVISOR), LARGEST_DIVISOR))
    return np.exp(weights, out=weights)


def _nucleus(weights: Float32, total: float, top_p: float) -> int:
    """How many of the descending `weights` it takes to hold `top_p` of `total`."""
    if top_p >= 1:
        return weights.shape[0]
    # A token is kept if those before it do not hold enough yet; the first always is.
    return 1 + int(np.searchsorted(np.cumsum(weights[:-1], dtype=np.float64), top_p * total, side="left"))


def _nucleus_of_all(logits: Float32, peak: float, params: SamplingParams) -> tuple[Int64, Float32, int]:
    """Top-p over the whole vocabulary, sorting only as many tokens as are needed."""
    total = float(_weights(logits, peak, params.temperature).sum(dtype=np.float64))
    count = _NUCLEUS_GUESS
    while True:
        ids = top_ids(logits, count)
        weights = _weights(logits[ids], peak, params.temperature)
        keep = _nucleus(weights, total, params.top_p)
        if keep < ids.shape[0] or ids.shape[0] == logits.shape[0]:
            return ids, weights, keep
        count *= 16
