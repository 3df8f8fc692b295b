"""The largest logits of rows on a device, and on the host what rules make of them: most choices need no more.

A few numbers a row come to the host in one copy. There the rules are those of `distribution.choices`, for all rows at
once, so that with a top-k tokens are those that the host's sampler would draw from the same logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from angelforge.runtime.batch import Bool, Float32, Int64
from angelforge.runtime.device_adjusting import Place
from angelforge.runtime.distribution import Float64

if TYPE_CHECKING:
    from angelforge.runtime.sampling import SamplingParams

MOST = 1024  # top-k up to here, and as many are looked at for top-p and min-p
_SMALLEST_DIVISOR = 1e-30  # as in distribution.py
_TIES = 12  # more than top-k: those that tie with the last are candidates, too


@dataclass(frozen=True, eq=False)
class Candidates:
    """What can come next, per row in the order of rising id within falling logits."""

    ids: Int64  # [n, W]
    weights: Float64  # [n, W] relative to the best token's 1; 0 for what cannot come
    count: Int64  # [n] of the candidates, those included whose weight is too small for a number; 0: nothing can come
    decided: Bool  # [n] False where the candidates may go on beyond the W largest

    def first(self, count: int) -> Candidates:
        """Of the first `count` rows."""
        return Candidates(self.ids[:count], self.weights[:count], self.count[:count], self.decided[:count])


def is_narrow(params: SamplingParams, vocab: int) -> bool:
    """Whether the largest logits may be enough for such rules: all but sampling from the whole vocabulary."""
    top_k = params.top_k if params.top_k < vocab else 0
    return params.greedy or 0 < top_k <= MOST or (top_k == 0 and (params.top_p < 1 or params.min_p > 0))


def largest_of(x: torch.Tensor, rules: RowRules, divisors: torch.Tensor | None) -> torch.Tensor:
    """What the host needs of each row of `x` f32 [n, vocab]: f32 [n, 2 W] or [n, 2 W + 2], for `candidates_of`.

    The W largest logits, the bits of their ids, and where a row has no top-k those of its weights' sum, an f64: only
    then `divisors` f32 [n, 1] are needed, those of `rules`.
    """
    top = x.topk(rules.width)
    columns = [top.values, top.indices.int().view(torch.float32)]
    if rules.any_wide:
        assert divisors is not None
        sums = ((x - top.values[:, :1]) / divisors).exp().sum(1, keepdim=True, dtype=torch.float64)
        columns.append(sums.view(torch.float32))
    return torch.cat(columns, 1)


def ids_of(table: Any, width: int) -> Any:
    """The ids int32 [n, W] in what `largest_of` made, a torch tensor, or on the host a NumPy array."""
    ids = table[:, width : 2 * width]
    return ids.view(torch.int32) if isinstance(table, torch.Tensor) else ids.view(np.int32)


def candidates_of(table: Float32, rules: RowRules) -> Candidates:
    """What can come next in each row; `table` is what `largest_of` made of them, on the host."""
    width, every = rules.width, rules.every
    values, ids = table[:, :width], ids_of(table, width).astype(np.int64)
    finite = np.isfinite(values[:, 0])  # NaN counts as the largest
    if np.count_nonzero(same := values[:, 1:] == values[:, :-1]):
        values, ids = _in_order(values, ids, same)
    last = values[every, rules.last]
    kept = values >= last[:, None]  # ties with the last included
    # Invalid: rows without a finite largest logit. Over: a tiny temperature makes distances infinite, as it should.
    with np.errstate(invalid="ignore", over="ignore"):
        weights = np.exp((values - values[:, :1]) / rules.divisors).astype(np.float64)
    weights *= kept
    # A running sum, unlike NumPy's `sum`, does not depend on how many zeros follow, so on the rows beside this one.
    sums = weights.cumsum(1)
    total = sums[:, -1]
    decided = rules.complete | (values[every, rules.edge] != last)  # else what ties with the last may go on
    if rules.any_wide:
        total = np.where(rules.wide, np.ascontiguousarray(table[:, 2 * width :]).view(np.float64)[:, 0], total)
    ended = _keep_likely(kept, values, weights, sums, total, rules)
    if rules.any_wide:
        decided = np.where(rules.wide, rules.complete | ended, decided)
    if rules.any_greedy:
        kept[rules.greedy] = np.arange(width) == 0
    weights *= kept
    count = kept.sum(1)
    if np.count_nonzero(finite) < len(finite):
        weights[~finite], count, decided = 0.0, np.where(finite, count, 0), ~finite | decided
    return Candidates(ids, weights, count, decided)


def draw_each(found: Candidates, requests: Sequence[Place]) -> Int64:
    """A token for each row, int64 [n], as `sampler.draw` would draw it; −1 where nothing can come.

    A request draws a number from its own generator where there is a choice, and its row is decided.
    """
    choice = ((found.count > 1) & found.decided).tolist()
    uniform = np.array([asked.rng.random() if wanted else 0.0 for asked, wanted in zip(requests, choice, strict=True)])
    sums = found.weights.cumsum(1)
    places = (sums <= (uniform * sums[:, -1])[:, None]).sum(1)
    if np.count_nonzero(found.count) < len(found.count):  # rows without weight
        places = places.clip(max=sums.shape[1] - 1)
        return np.where(found.count > 0, found.ids[np.arange(len(places)), places], -1)
    return found.ids[np.arange(len(places)), places]


@dataclass(frozen=True, eq=False)
class RowRules:
    """Rules of n rows as arrays."""

    width: int  # W, logits that are looked at in every row
    greedy: Bool  # [n]; the other rules of such a row keep everything
    divisors: Float32  # [n, 1] the temperatures
    top_p: Float64  # [n]
    min_p: Float64  # [n]
    wide: Bool  # [n] whether there is no top-k
    any_wide: bool
    complete: Bool  # [n] whether the logits that decide a row, whatever W is for others, are the whole vocabulary
    # Of the above, what is used again and again:
    every: Int64  # [n] 0, 1, …
    last: Int64  # [n] where the top-k-th is
    edge: Int64  # [n] where the last that decides a row is
    any_greedy: bool
    any_nucleus: bool
    any_floor: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab: int) -> RowRules:
        """Of each row's parameters."""
        rows = [
            (1.0, 1, 1.0, 0.0)
            if each.greedy
            else (each.temperature, each.top_k if each.top_k < vocab else 0, each.top_p, each.min_p)
            for each in params
        ]
        temperature, top_k, top_p, min_p = np.array(rows, np.float64).T
        wide = top_k == 0
        any_wide = bool(wide.any())
        width = min(max(int(top_k.max()) + _TIES, MOST if any_wide else 1), vocab)
        seen = np.minimum(np.where(wide, MOST, top_k + _TIES), vocab).astype(np.int64)
        return cls(
            width=width,
            greedy=(greedy := np.array([each.greedy for each in params])),
            divisors=np.maximum(temperature, _SMALLEST_DIVISOR).astype(np.float32)[:, None],
            top_p=top_p,
            min_p=min_p,
            wide=wide,
            any_wide=any_wide,
            complete=seen == vocab,
            every=np.arange(len(params)),
            last=np.where(wide, width, top_k).astype(np.int64) - 1,
            edge=seen - 1,
            any_greedy=bool(greedy.any()),
            any_nucleus=bool((top_p < 1).any()),
            any_floor=bool((min_p > 0).any()),
        )


def _keep_likely(kept: Bool, values: Float32, weights: Float64, sums: Float64, total: Float64, rules: RowRules) -> Bool:
    """Takes from `kept` [n, W] what top-p and min-p leave out; whether either says where the candidates end [n]."""
    ended, every, edge = np.zeros(len(kept), bool), rules.every, rules.edge
    if rules.any_nucleus:
        nucleus = rules.top_p < 1
        wanted = (rules.top_p * total)[:, None]
        inside = (sums[:, :-1] < wanted) | ~nucleus[:, None]
        # Of ties at the end those with the lowest ids are kept: all of them must have been seen.
        least = values[every, inside.sum(1)]
        ended |= nucleus & (sums[every, edge] >= wanted[:, 0]) & (values[every, edge] != least)
        kept[:, 1:] &= inside
    if rules.any_floor:
        floor = rules.min_p > 0
        kept &= (weights >= rules.min_p[:, None]) | ~floor[:, None]
        ended |= floor & (weights[every, edge] < rules.min_p)
    return ended


def _in_order(values: Float32, ids: Int64, same: Bool) -> tuple[Float32, Int64]:
    """Equal logits by rising id, where some are the `same` as the next: the device leaves their order open."""
    for row in np.flatnonzero(same.any(1)):
        order = np.lexsort((ids[row], -values[row]))
        values[row], ids[row] = values[row, order], ids[row, order]
    return values, ids
