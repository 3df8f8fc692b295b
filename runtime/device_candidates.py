"""What can come next at many places at once, from logits on a device: a few numbers a row come to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from angelforge.runtime.batch import Int64
from angelforge.runtime.device import to_host
from angelforge.runtime.device_adjusting import adjusted_rows
from angelforge.runtime.device_largest import RowRules, candidates_of, is_narrow, largest_of
from angelforge.runtime.distribution import Float64, candidates
from angelforge.runtime.history import Seen

if TYPE_CHECKING:
    from angelforge.runtime.sampler import Drawing
    from angelforge.runtime.sampling import SamplingParams


@dataclass(frozen=True, eq=False)
class Place:
    """A row of logits and what holds there; looks like a request to `adjusted_rows`."""

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

    Where the largest logits do not tell, the whole row comes to the host. Raises AngelForgeError where the device fails
    in this or earlier work.
    """
    known: dict[int, tuple[Int64, Float64]] = {}
    narrow = [i for i, place in enumerate(places) if is_narrow(place.params, logits.shape[1])]
    if narrow:
        chosen = [places[i] for i in narrow]
        x = adjusted_rows(logits, [place.row for place in chosen], chosen)
        rules = RowRules.of([place.params for place in chosen], x.shape[1])
        found = candidates_of(to_host(largest_of(x, rules)), rules)
        for i, ids, weights, count, decided in zip(
            narrow, found.ids, found.weights, found.count, found.decided, strict=True
        ):
            if count == 0:
                known[i] = np.empty(0, np.int64), np.empty(0, np.float64)
            elif decided:
                kept = weights > 0
                known[i] = ids[kept], weights[kept] / weights[kept].sum()
    for i, place in enumerate(places):
        if i not in known:
            known[i] = candidates(to_host(logits[place.row]), place.params, place.history)
    return [known[i] for i in range(len(places))]
