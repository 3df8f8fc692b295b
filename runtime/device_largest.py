"""The largest logits of rows on a device, and on the host what rules make of them: most choices need no more.

A few numbers a row come to the host in one copy. There the rules are those of `distribution.choices`, for all rows at
once, so that with a top-k tokens are those that the host's sampler would draw from the same logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from angelforge.runtime.batch import Bool, Float32, Int64
from angelforge.runtime.device_adjusting import Asked, Packed
from angelforge.runtime.distribution import Float64

if TYPE_CHECKING:
    from angelforge.runtime.sampling import SamplingParams

MOST = 1024  # top-k up to here, and as many are looked at for top-p and min-p
_TIES = 12  # more than top-k: those that tie with the last are candidates, too


@dataclass(frozen=True, eq=False)
class Candidates:
    """What can come next, per row in the order of rising id within falling logits."""

    ids: Int64  # [n, W]
    weights: Float64  # [n, W] relative to the best token's 1; 0 for what cannot come
    finite: Bool  # [n] whether anything can
    decided: Bool  # [n] False where the candidates may go on beyond the W largest


def is_narrow(params: SamplingParams, vocab: int) -> bool:
    """Whether the largest logits may be enough for such rules: all but sampling from the whole vocabulary."""
    top_k = params.top_k if params.top_k < vocab else 0
    return params.greedy or 0 < top_k <= MOST or (top_k == 0 and (params.top_p < 1 or params.min_p > 0))


def largest_of(x: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """What the host needs of each row of `x` f32 [n, vocab]: f32 [n, 2 W] or [n, 2 W + 2], for `candidates_of`.

    The W largest logits, the bits of their ids, and where a row has no top-k those of its weights' sum, an f64.
    """
    wide, width = _looked_at(params, x.shape[1])
    top = x.topk(width)
    columns = [top.values, top.indices.int().view(torch.float32)]
    if wide.any():
        packed = Packed(x.device)
        packed.add("divisors", _divisors(params))
        packed.send()
        sums = ((x - top.values[:, :1]) / packed["divisors"]).exp().sum(1, keepdim=True, dtype=torch.float64)
        columns.append(sums.view(torch.float32))
    return torch.cat(columns, 1)


def candidates_of(table: Float32, params: Sequence[SamplingParams], vocab: int) -> Candidates:
    """What can come next in each row; `table` is what `largest_of` made of them, on the host."""
    wide, width = _looked_at(params, vocab)
    values, ids = table[:, :width], table[:, width : 2 * width].view(np.int32).astype(np.int64)
    finite = np.isfinite(values[:, 0])  # NaN counts as the largest
    values, ids = _in_order(values, ids)
    # Invalid: rows without a finite largest logit. Over: a tiny temperature makes distances infinite, as it should.
    with np.errstate(invalid="ignore", over="ignore"):
        weights = np.exp((values - values[:, :1]) / _divisors(params)).astype(np.float64)
    greedy = np.array([each.greedy for each in params])
    top_k = np.array([1 if each.greedy else each.top_k or width for each in params]).clip(max=width)
    last = values[np.arange(len(params)), top_k - 1]
    among = np.where(wide[:, None], True, values >= last[:, None])  # ties with the last included
    among[greedy] = np.arange(width) == 0
    weights = np.where(among, weights, 0.0)
    reaches = values[:, -1] == last  # what ties with the last may go on
    total = weights.sum(1)
    if wide.any():
        total = np.where(wide, np.ascontiguousarray(table[:, 2 * width :]).view(np.float64)[:, 0], total)
    kept, open_end = _kept(values, weights, total, params)
    undecided = np.where(wide, open_end, reaches)
    decided = (width == vocab) | ~finite | ~undecided
    return Candidates(ids, np.where(kept, weights, 0.0), finite, decided)


def draw_each(found: Candidates, requests: Sequence[Asked]) -> Int64:
    """A token for each row, int64 [n], as `sampler.draw` would draw it; −1 where nothing can come.

    A request draws a number from its own generator where there is a choice, and its row is decided.
    """
    weights = np.where(found.finite[:, None], found.weights, 0.0)
    choice = (np.count_nonzero(weights, axis=1) > 1) & found.decided
    uniform = np.array([asked.rng.random() if wanted else 0.0 for asked, wanted in zip(requests, choice, strict=True)])
    with np.errstate(invalid="ignore"):  # rows without weights
        sums = np.cumsum(weights / weights.sum(1, keepdims=True), 1)
    places = (sums <= (uniform * sums[:, -1])[:, None]).sum(1).clip(max=weights.shape[1] - 1)
    return np.where(found.finite, found.ids[np.arange(len(places)), places], -1)


def _kept(values: Float32, weights: Float64, total: Float64, params: Sequence[SamplingParams]) -> tuple[Bool, Bool]:
    """What top-p and min-p keep [n, W], and for rows without top-k whether that may go on behind the last [n]."""
    top_p = np.array([1.0 if each.greedy else each.top_p for each in params])
    min_p = np.array([0.0 if each.greedy else each.min_p for each in params])
    kept = np.ones(values.shape, bool)
    nucleus = top_p < 1
    ends = np.zeros(len(params), bool)
    if nucleus.any():
        wanted = (top_p * total)[:, None]
        sums = np.cumsum(weights, 1)
        kept[:, 1:] = (sums[:, :-1] < wanted) | ~nucleus[:, None]
        # Ties at the end: those with the lowest ids are kept, of all that there are.
        count = kept.sum(1)
        edge = values[np.arange(len(params)), count - 1]
        ends |= nucleus & (sums[:, -1] >= wanted[:, 0]) & (values[:, -1] != edge)
    if (min_p > 0).any():
        kept &= (weights >= min_p[:, None]) | (min_p == 0)[:, None]
        ends |= (min_p > 0) & (weights[:, -1] < min_p)
    return kept, ~ends


def _looked_at(params: Sequence[SamplingParams], vocab: int) -> tuple[Bool, int]:
    """Which rows have no top-k, and the number W of logits that are looked at in every row."""
    wide = [not (each.greedy or 0 < each.top_k < vocab) for each in params]
    narrow = max(1 if each.greedy or each.top_k >= vocab else each.top_k for each in params) + _TIES
    return np.array(wide), min(max(narrow, MOST) if any(wide) else narrow, vocab)


def _divisors(params: Sequence[SamplingParams]) -> Float32:
    """The temperatures f32 [n, 1]; greedy rows have 1, as only their largest counts."""
    values = [1.0 if each.greedy else each.temperature for each in params]
    return np.maximum(np.array(values, np.float64), 1e-30).astype(np.float32)[:, None]


def _in_order(values: Float32, ids: Int64) -> tuple[Float32, Int64]:
    """Equal logits by rising id: the device leaves their order open."""
    for row in np.flatnonzero((values[:, 1:] == values[:, :-1]).any(1)):
        order = np.lexsort((ids[row], -values[row]))
        values[row], ids[row] = values[row, order], ids[row, order]
    return values, ids
