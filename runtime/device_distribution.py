"""The distribution that requests' rules make of rows of logits, where the logits lie: `distribution.py` over torch.

Every operation works on all rows at once, waits for nothing and sorts no vocabulary. A row's result depends on its own
logits and rules alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

_SMALLEST_DIVISOR = 1e-30  # as in distribution.py
MOST_SORTED = 1024  # top-k up to here takes the k largest; a larger k is found as top-p is, by bisection
_LEAST_KEY, _MOST_KEY, _BITS = -(2**31), 2**31 - 1, 32


@dataclass(frozen=True, eq=False)
class Rules:
    """Rules of n rows, f64 [n, 1] each; the numbers say what the greediest row wants, so that the rest can be left out.

    Rows without top-k have the vocabulary's size there.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    largest_k: int  # of the rows that have a top-k, 0 for none
    every_nucleus_sorted: bool  # each row with top-p has a top-k, too
    nucleus: bool  # some row has a top-p
    floor: bool  # some row has a min-p

    def part(self, begin: int, end: int) -> Rules:
        """Of some of the rows."""
        columns = ("temperature", "top_k", "top_p", "min_p")
        return replace(self, **{name: getattr(self, name)[begin:end] for name in columns})


def kept_weights(x: torch.Tensor, best: torch.Tensor, rules: Rules) -> torch.Tensor:
    """What can come next: weights f32 [n, vocab] relative to the best token's 1, and 0 for what cannot.

    `x` f32 [n, vocab] are the adjusted logits, `best` int64 [n, 1] their largest's ids. Rows whose largest logit is not
    finite give nonsense.
    """
    peak = x.gather(1, best)
    divisor = rules.temperature.clamp(min=_SMALLEST_DIVISOR).float()

    def weights_of(values: torch.Tensor) -> torch.Tensor:
        return ((values - peak) / divisor).exp()

    weights = weights_of(x)
    sorted_values = None
    if rules.largest_k:
        if rules.largest_k <= MOST_SORTED:
            sorted_values = x.topk(rules.largest_k).values  # [n, K]
            last = (rules.top_k.clamp(max=rules.largest_k) - 1).long()
            limit = sorted_values.gather(1, last)
            limit = torch.where(rules.top_k < x.shape[1], limit, -torch.inf)
        else:
            keys = _keys(x)
            key = _largest_key(x.shape[0], x.device, lambda mid: (keys >= mid).sum(1, keepdim=True) >= rules.top_k)
            limit = torch.where(rules.top_k < x.shape[1], _value_of(key), -torch.inf)
        weights = torch.where(x >= limit, weights, 0.0)  # ties with the last are kept, too
    if rules.nucleus:
        if rules.every_nucleus_sorted and sorted_values is not None:
            limit = _sorted_limit(sorted_values, weights_of(sorted_values), weights, rules)
        else:
            limit = _searched_limit(x, weights, rules)
        weights = _cut_nucleus(x, weights, limit, weights_of(limit), rules)
    if rules.floor:
        weights = torch.where(weights >= rules.min_p, weights, 0.0)
    return weights


def draw_rows(weights: torch.Tensor, best: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One id int64 [n, 1] for each row, with probability proportional to `weights` f32 [n, vocab].

    `uniform` f64 [n, 1] lie in [0, 1): a row's token is where the running sum passes its part of the whole.
    """
    sums = weights.cumsum(1, dtype=torch.float64)  # [n, vocab]
    place = torch.searchsorted(sums, uniform * sums[:, -1:], right=True).clamp(max=weights.shape[1] - 1)
    # A parallel sum may pass the mark by a rounding at a token without weight: then the best one is taken.
    return torch.where(weights.gather(1, place) > 0, place, best)


def _sorted_limit(values: torch.Tensor, of_values: torch.Tensor, weights: torch.Tensor, rules: Rules) -> torch.Tensor:
    """The least logit in the nucleus, f32 [n, 1], from the K largest `values` [n, K] and their weights."""
    total = weights.sum(1, keepdim=True, dtype=torch.float64)
    sums = of_values.cumsum(1, dtype=torch.float64)  # [n, K]
    place = (sums < rules.top_p * total).sum(1, keepdim=True)
    last = rules.top_k.clamp(max=values.shape[1]).long() - 1  # ties with the k-th go on behind it
    return values.gather(1, torch.minimum(place, last))


def _searched_limit(x: torch.Tensor, weights: torch.Tensor, rules: Rules) -> torch.Tensor:
    """The same by bisection over all f32 numbers: the largest at which what is not smaller holds enough."""
    keys = _keys(x)
    wanted = rules.top_p * weights.sum(1, keepdim=True, dtype=torch.float64)

    def enough(mid: torch.Tensor) -> torch.Tensor:
        return torch.where(keys >= mid, weights, 0.0).sum(1, keepdim=True, dtype=torch.float64) >= wanted

    return _value_of(_largest_key(x.shape[0], x.device, enough))


def _cut_nucleus(
    x: torch.Tensor, weights: torch.Tensor, limit: torch.Tensor, at_limit: torch.Tensor, rules: Rules
) -> torch.Tensor:
    """Keeps what lies above `limit` [n, 1], and of its ties the fewest, lowest ids first, that hold top-p."""
    wanted = rules.top_p * weights.sum(1, keepdim=True, dtype=torch.float64)
    above = torch.where(x > limit, weights, 0.0).sum(1, keepdim=True, dtype=torch.float64)
    each = at_limit.double().clamp(min=torch.finfo(torch.float64).tiny)
    count = ((wanted - above) / each).ceil().clamp(min=1)
    # The division may round across a whole number; the sums themselves decide.
    count = count + (above + count * each < wanted).double()
    count = count - ((count > 1) & (above + (count - 1) * each >= wanted)).double()
    ties = x == limit
    kept = (x > limit) | (ties & (ties.cumsum(1, dtype=torch.int32) <= count)) | (rules.top_p >= 1)
    return torch.where(kept, weights, 0.0)


def _keys(x: torch.Tensor) -> torch.Tensor:
    """int32 [n, vocab] in the order of the f32 numbers: IEEE's bits, those of negative numbers turned around."""
    bits = (x + 0.0).view(torch.int32)  # −0 becomes 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _value_of(keys: torch.Tensor) -> torch.Tensor:
    keys = keys.int()
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _largest_key(rows: int, device: torch.device, enough: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The largest key for which `enough` (keys int64 [n, 1] → bool [n, 1], true below some key) holds."""
    low = torch.full((rows, 1), _LEAST_KEY, dtype=torch.int64, device=device)
    high = torch.full((rows, 1), _MOST_KEY, dtype=torch.int64, device=device)
    for _ in range(_BITS):
        middle = (low + high + 1) >> 1
        holds = enough(middle)
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle - 1)
    return low
