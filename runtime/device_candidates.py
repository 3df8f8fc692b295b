"""What can come next at many places at once, from logits on a device: a few ids a row come to the host, not the row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from angelforge.runtime.batch import Float32, Int64
from angelforge.runtime.device import to_host
from angelforge.runtime.device_distribution import MOST_SORTED, kept_weights
from angelforge.runtime.device_sampling import Packed, adjusted_rows, pack_requests
from angelforge.runtime.distribution import Float64, candidates

if TYPE_CHECKING:
    from angelforge.runtime.sampler import Drawing
    from angelforge.runtime.sampling import SamplingParams

_TIES = 64  # more candidates than top-k that are looked at: all that tie with the last are kept


@dataclass(frozen=True, eq=False)
class Seen:
    """A history as it stands at one place."""

    ids: Int64
    counts: Float32


@dataclass(frozen=True, eq=False)
class Place:
    """A row of logits and what holds there; looks like a request to `pack_requests`."""

    row: int
    params: SamplingParams
    history: Seen | None
    rng: np.random.Generator
    constraint: None = None  # a constrained request is not drafted


def places_of(first: int, request: Drawing, proposed: Sequence[int]) -> list[Place]:
    """The rows of a request from `first` on: after none, one, … of its proposals."""
    history, places = request.history, []
    for place in range(len(proposed) + 1):
        seen = None if history is None else Seen(history.ids.copy(), history.counts.copy())
        places.append(Place(first + place, request.params, seen, request.rng))
        if history is not None and place < len(proposed):
            history.add(proposed[place])
    for token in reversed(proposed):
        if history is not None:
            history.take_back(token)
    return places


def candidates_on_device(logits: torch.Tensor, places: Sequence[Place]) -> list[tuple[Int64, Float64]]:
    """What `distribution.candidates` gives for each place, from `logits` f32 [R, vocab] on a device.

    Rows with a top-k up to 1024 are worked on there, all at once; whole rows come to the host for the others. Raises
    AngelForgeError where the device fails in this or earlier work.
    """
    found: dict[int, tuple[Int64, Float64]] = {}
    there = [i for i, place in enumerate(places) if place.params.greedy or 0 < place.params.top_k <= MOST_SORTED]
    if there:
        chosen = [places[i] for i in there]
        for i, result in zip(there, _few_of(logits, chosen), strict=True):
            if result is not None:
                found[i] = result
    for i, place in enumerate(places):
        if i not in found:
            found[i] = candidates(to_host(logits[place.row]), place.params, place.history)
    return [found[i] for i in range(len(places))]


def _few_of(logits: torch.Tensor, places: Sequence[Place]) -> list[tuple[Int64, Float64] | None]:
    """Ids and probabilities; None for a row with more candidates than were looked at."""
    packed, vocab = Packed(logits.device), logits.shape[1]
    rules = pack_requests([place.row for place in places], places, vocab, packed, drawing=False)
    x = adjusted_rows(logits, places, packed)
    best = x.argmax(1, keepdim=True)
    finite = x.gather(1, best).isfinite()
    weights = kept_weights(x, best, rules)
    width = min(rules.largest_k + _TIES, vocab)
    top = weights.topk(width)
    count = (weights > 0).sum(1, keepdim=True)
    columns = (finite, best, count, top.values, top.indices)
    table: Float64 = to_host(torch.cat([column.double() for column in columns], 1))  # one copy; ids are exact in f64
    results: list[tuple[Int64, Float64] | None] = []
    for place, row in zip(places, table, strict=True):
        if not row[0]:
            results.append((np.empty(0, np.int64), np.empty(0, np.float64)))
        elif place.params.greedy:
            results.append((row[1:2].astype(np.int64), np.ones(1)))
        elif row[2] > width:
            results.append(None)
        else:
            kept = row[3 : 3 + int(row[2])]
            ids = row[3 + width : 3 + width + len(kept)].astype(np.int64)
            results.append((ids, kept / kept.sum()))
    return results
