"""Bias, penalties and grammar masks on rows of logits that lie on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from angelforge.runtime.device_history import DeviceHistories
from angelforge.runtime.device_transfer import Packed
from angelforge.runtime.history import History

if TYPE_CHECKING:
    from angelforge.runtime.constraint import Constraint
    from angelforge.runtime.sampler import Drawing
    from angelforge.runtime.sampling import SamplingParams

_PENALTIES = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}  # without effect


@dataclass(frozen=True, eq=False)
class Place:
    """A row of logits, and what holds for the token that it gives."""

    row: int
    params: SamplingParams
    history: History | None  # of all before, without `ahead`
    rng: np.random.Generator
    constraint: Constraint | None = None
    ahead: tuple[int, ...] = ()  # proposals that stand before it
    logprobs: int | None = None  # of the likeliest tokens that are told beside the one that is chosen

    @classmethod
    def of(cls, row: int, request: Drawing, ahead: tuple[int, ...] = ()) -> Place:
        """A request's place."""
        params = request.params
        return cls(row, params, request.history, request.rng, request.constraint, ahead, params.logprobs)


def places_of(first: int, request: Drawing, proposed: Sequence[int]) -> list[Place]:
    """The rows of a request from `first` on: after none, one, … of its proposals."""
    return [Place.of(first + count, request, tuple(proposed[:count])) for count in range(len(proposed) + 1)]


class Standing:
    """What does not change as long as the same rules stand in the same rows: most steps are like the last.

    It holds no histories, which go when their requests end.
    """

    def __init__(self, shape: Sequence[int], places: Sequence[Place]) -> None:
        """Of rows of logits [R, vocab]."""
        self._key = _key(shape, places)
        self.arrays: dict[str, Any] = {}
        rows, vocab = [place.row for place in places], shape[1]
        if len(rows) < shape[0] or rows != list(range(shape[0])):
            self.arrays["rows"] = np.array(rows, np.int64)
        numbered = list(enumerate(places))
        if biased := [(number, place.params.bias) for number, place in numbered if place.params.logit_bias]:
            self.arrays["biased"] = np.concatenate([bias.ids + number * vocab for number, bias in biased])
            self.arrays["bias"] = np.concatenate([bias.values_f32 for _, bias in biased])
        self.penalized = [number for number, place in numbered if place.params.penalizes]
        self.masked = [number for number, place in numbered if place.constraint is not None]
        if self.masked:
            self.arrays["masked"] = np.array(self.masked)
        asked = [places[number].params for number in self.penalized]
        self.used = [name for name, off in _PENALTIES.items() if any(getattr(each, name) != off for each in asked)]
        self.kept = [number for number, place in numbered if _is_kept(place)]
        if self.kept:
            self.arrays["kept.rows"] = np.array(self.kept, np.int64) * vocab
            for name in self.used:
                each = [[getattr(places[number].params, name)] for number in self.kept]
                self.arrays[f"kept.{name}"] = np.array(each, np.float32)

    def holds(self, shape: Sequence[int], places: Sequence[Place]) -> bool:
        """Whether it is the same for these places."""
        numbers, rules = _key(shape, places)
        return numbers == self._key[0] and all(map(is_, rules, self._key[1]))


def _key(shape: Sequence[int], places: Sequence[Place]) -> tuple[list[int], list[SamplingParams]]:
    """(numbers, rules): equal numbers and the same rules stand for the same arrays."""
    numbers = [*shape]
    for place in places:
        numbers += (place.row, place.constraint is None, _is_kept(place))
    return numbers, [place.params for place in places]


def pack_adjustments(
    packed: Packed, standing: Standing, places: Sequence[Place], vocab: int, histories: DeviceHistories
) -> bool:
    """Adds to `packed` all that changes the rows of some places; whether they are not all rows, as they are."""
    for name, array in standing.arrays.items():
        packed.add(name, array)
    if standing.kept:
        kept = [history for number in standing.kept if (history := places[number].history) is not None]
        every = list(dict.fromkeys(kept))
        begins = histories.pack(packed, every)
        if len(every) < len(kept):
            begin_of = dict(zip(every, begins.tolist(), strict=True))
            begins = np.array([begin_of[history] for history in kept], np.int64)
        packed.add("kept.begins", begins)
        sizes = [history.size for history in kept]
        packed.add("kept.sizes", np.array(sizes, np.int64))
        packed.widths["kept"] = max(sizes)
    _pack_listed(packed, standing, places, vocab)
    if standing.masked:
        masks = [constraint.mask() for number in standing.masked if (constraint := places[number].constraint)]
        packed.add("words", np.stack(masks).view(np.int32))
    return bool(standing.arrays) or bool(standing.penalized)


def adjusted_rows(logits: torch.Tensor, packed: Packed, histories: DeviceHistories) -> torch.Tensor:
    """The rows f32 [n, vocab] of `logits` f32 [R, vocab] after what was packed for them, as `distribution.adjusted`."""
    x = logits.clone() if (chosen := packed.get("rows")) is None else logits.index_select(0, chosen)
    flat = x.view(-1)
    if (places := packed.get("biased")) is not None:
        flat.index_put_((places,), flat.index_select(0, places) + packed["bias"])
    _penalize(flat, x.shape[1], packed, histories)
    if (words := packed.get("words")) is not None:
        bits = (words.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=x.device)) & 1  # [m, words, 32]
        known = bits.flatten(1)[:, : x.shape[1]].bool()
        allowed = torch.zeros((words.shape[0], x.shape[1]), dtype=torch.bool, device=x.device)
        allowed[:, : known.shape[1]] = known  # ids beyond the mask are not allowed
        masked = packed["masked"]
        x.index_copy_(0, masked, x.index_select(0, masked).masked_fill(~allowed, -torch.inf))
    return x


def _is_kept(place: Place) -> bool:
    """Whether a device keeps what was seen before a place."""
    return place.params.penalizes and place.history is not None and place.history.size > 0


def _pack_listed(packed: Packed, standing: Standing, places: Sequence[Place], vocab: int) -> None:
    """The ids of proposals, which no kept history has, or which count differently at their places."""
    listed = []
    for number in standing.penalized:
        place, history = places[number], places[number].history
        if history is not None and place.ahead:
            ids = sorted(set(place.ahead))
            counts = [history.count(token) + place.ahead.count(token) for token in ids]
            listed.append((number, place, np.array(ids, np.int64), np.array(counts, np.float32)))
    if not listed:
        return
    lengths = [ids.shape[0] for _, _, ids, _ in listed]
    packed.add("listed.places", np.concatenate([ids + number * vocab for number, _, ids, _ in listed]))
    packed.add("listed.counts", np.concatenate([counts for *_, counts in listed]))
    for name in standing.used:
        each = np.array([getattr(place.params, name) for _, place, *_ in listed], np.float32)
        packed.add(f"listed.{name}", np.repeat(each, lengths))


def _penalize(flat: torch.Tensor, vocab: int, packed: Packed, histories: DeviceHistories) -> None:
    listed, values = packed.get("listed.places"), None
    if listed is not None:  # from what lies there before the lines are: these ids count differently at their places
        values = _penalized(flat.index_select(0, listed), packed["listed.counts"], packed, "listed")
    if (begins := packed.get("kept.begins")) is not None:
        histories.update(packed)
        ids, counts = histories.read(begins, packed["kept.sizes"], packed.widths["kept"])
        places = (ids + packed["kept.rows"].unsqueeze(1)).view(-1)
        seen = flat.index_select(0, places).view(ids.shape)
        # An id that stands in a line twice is written twice, as the same number.
        flat.index_put_((places,), _penalized(seen, counts, packed, "kept").view(-1))
    if listed is not None:
        flat.index_put_((listed,), values)


def _penalized(values: torch.Tensor, counts: torch.Tensor, packed: Packed, group: str) -> torch.Tensor:
    if (factor := packed.get(f"{group}.repetition_penalty")) is not None:
        values = torch.where(values > 0, values / factor, values * factor)
    if (each := packed.get(f"{group}.frequency_penalty")) is not None:
        values = values - each * counts
    if (once := packed.get(f"{group}.presence_penalty")) is not None:
        values = values - once * (counts > 0)
    return values
