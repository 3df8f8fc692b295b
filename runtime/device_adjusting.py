"""Bias, penalties and grammar masks on rows of logits that lie on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from angelforge.runtime.device_history import DeviceHistories
from angelforge.runtime.device_transfer import Packed
from angelforge.runtime.history import Counted, History, Seen

if TYPE_CHECKING:
    from angelforge.runtime.constraint import Constraint
    from angelforge.runtime.sampler import Drawing
    from angelforge.runtime.sampling import SamplingParams

_PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")


@dataclass(frozen=True, eq=False)
class Place:
    """A row of logits, and what holds for the token that it gives."""

    row: int
    params: SamplingParams
    history: History | Seen | None  # of all before, without `ahead`
    rng: np.random.Generator
    constraint: Constraint | None = None
    ahead: tuple[int, ...] = ()  # proposals that stand before it
    logprobs: int | None = None  # of the likeliest tokens that are told beside the one that is chosen

    @classmethod
    def of(cls, row: int, request: Drawing, ahead: tuple[int, ...] = ()) -> Place:
        """A request's place."""
        params = request.params
        return cls(row, params, request.history, request.rng, request.constraint, ahead, params.logprobs)

    def seen(self) -> Counted | None:
        """The history with the proposals before this place."""
        history = self.history
        if not isinstance(history, History):
            return history
        for token in self.ahead:
            history.add(token)
        found = Seen(history.ids.copy(), history.counts.copy())
        for token in reversed(self.ahead):
            history.take_back(token)
        return found


def places_of(first: int, request: Drawing, proposed: Sequence[int]) -> list[Place]:
    """The rows of a request from `first` on: after none, one, … of its proposals."""
    return [Place.of(first + count, request, tuple(proposed[:count])) for count in range(len(proposed) + 1)]


def pack_adjustments(packed: Packed, shape: Sequence[int], places: Sequence[Place], histories: DeviceHistories) -> bool:
    """Adds to `packed` all that changes the rows `places` of logits [R, vocab]; whether they are not all, as they are.

    Histories of requests are kept on the device, others are sent as they are, each id once.
    """
    rows = [place.row for place in places]
    changed = len(rows) < shape[0] or rows != list(range(shape[0]))
    if changed:
        packed.add("rows", np.array(rows, np.int64))
    numbered, vocab = list(enumerate(places)), shape[1]
    if biased := [(number, place.params.bias) for number, place in numbered if place.params.logit_bias]:
        packed.add("biased", np.concatenate([bias.ids + number * vocab for number, bias in biased]))
        packed.add("bias", np.concatenate([bias.values_f32 for _, bias in biased]))
    penalized = [(number, place) for number, place in numbered if place.params.penalizes]
    if penalized:
        _pack_penalties(packed, vocab, penalized, histories)
    masks = [(number, place.constraint.mask()) for number, place in numbered if place.constraint is not None]
    if masks:
        packed.add("masked", np.array([number for number, _ in masks]))
        packed.add("words", np.stack([words for _, words in masks]).view(np.int32))
    return changed or bool(biased or penalized or masks)


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


def _pack_penalties(
    packed: Packed, vocab: int, penalized: Sequence[tuple[int, Place]], histories: DeviceHistories
) -> None:
    """Which lines of `histories` hold for which row, and by themselves the ids that no line has."""
    kept, kept_histories, listed = [], [], []
    for number, place in penalized:
        history = place.history
        assert history is not None
        if not isinstance(history, History):
            listed.append((number, place, history.ids, history.counts))
            continue
        if history.ids.shape[0]:
            kept.append((number, place))
            kept_histories.append(history)
        if place.ahead:
            ids = sorted(set(place.ahead))
            counts = [history.count(token) + place.ahead.count(token) for token in ids]
            listed.append((number, place, np.array(ids, np.int64), np.array(counts, np.float32)))
    used = [name for name in _PENALTIES if any(getattr(place.params, name) != _OFF[name] for _, place in penalized)]
    if kept:
        every = list(dict.fromkeys(kept_histories))
        begin_of = dict(zip(every, histories.pack(packed, every).tolist(), strict=True))
        packed.add("kept.begins", np.array([begin_of[history] for history in kept_histories], np.int64))
        sizes = np.array([history.ids.shape[0] for history in kept_histories], np.int64)
        packed.add("kept.sizes", sizes)
        packed.widths["kept"] = int(sizes.max())
        packed.add("kept.rows", np.array([number for number, _ in kept], np.int64) * vocab)
        for name in used:
            packed.add(f"kept.{name}", np.array([[getattr(place.params, name)] for _, place in kept], np.float32))
    if listed:
        lengths = [ids.shape[0] for _, _, ids, _ in listed]
        packed.add("listed.places", np.concatenate([ids + number * vocab for number, _, ids, _ in listed]))
        packed.add("listed.counts", np.concatenate([counts for *_, counts in listed]))
        for name in used:
            each = np.array([getattr(place.params, name) for _, place, *_ in listed], np.float32)
            packed.add(f"listed.{name}", np.repeat(each, lengths))


_OFF = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}


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
