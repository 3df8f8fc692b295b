"""Rows of logits on a device that give a token, and their rules as arrays; bias and penalties, where the logits lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from angelforge.runtime.batch import Int32
from angelforge.runtime.device_history import DeviceHistories
from angelforge.runtime.device_transfer import Packed
from angelforge.runtime.device_work import SeenRows, Work
from angelforge.runtime.history import History

if TYPE_CHECKING:
    from angelforge.runtime.constraint import Constraint, UInt32
    from angelforge.runtime.sampler import Drawing
    from angelforge.runtime.sampling import SamplingParams


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

    def __init__(self, vocab: int, places: Sequence[Place]) -> None:
        """Of rows of `vocab` logits."""
        self._key, self._vocab = _key(vocab, places), vocab
        params = [place.params for place in places]
        rows = np.array([place.row for place in places], np.int64)
        self.arrays: dict[str, Any] = {}
        # Logprobs are of the raw logits: where a place wants them, what changes its row works on a copy.
        if any(each.logprobs is not None and (each.params.penalizes or each.params.logit_bias) for each in places):
            self.arrays["copied"], rows = rows, np.arange(len(places))
        self.arrays["rows"] = rows
        rules = [(each.temperature, min(each.top_k, vocab), each.top_p, each.min_p) for each in params]
        self.arrays["rules"] = np.array(rules, np.float64).reshape(-1, 4)
        self.greedy = all(each.greedy for each in params)
        if self.greedy:
            self.arrays["uniform"] = np.zeros(len(places))
        numbered = list(zip(rows.tolist(), params, strict=True))
        if biased := [(row * vocab, each.bias) for row, each in numbered if each.logit_bias]:
            self.arrays["biased"] = np.concatenate([bias.ids + begin for begin, bias in biased])
            self.arrays["bias"] = np.concatenate([bias.values_f32 for _, bias in biased])
        self.penalized = [number for number, each in enumerate(params) if each.penalizes]
        if self.penalized:
            self.arrays["penalized"] = rows[self.penalized]
            taken = [(each.repetition_penalty, each.frequency_penalty, each.presence_penalty) for each in params]
            self.arrays["penalties"] = np.array(taken, np.float32)[self.penalized]
        self.masked = [number for number, place in enumerate(places) if place.constraint is not None]
        if self.masked:
            mask_of = np.full(len(places), -1, np.int32)
            mask_of[self.masked] = np.arange(len(self.masked))
            self.arrays["mask_of"] = mask_of

    def holds(self, vocab: int, places: Sequence[Place]) -> bool:
        """Whether it is the same for these places."""
        numbers, rules = _key(vocab, places)
        return numbers == self._key[0] and all(map(is_, rules, self._key[1]))

    def pack(self, packed: Packed, places: Sequence[Place], histories: DeviceHistories) -> int:
        """Adds to `packed` what a device has to know of the places; gives the size of the longest history."""
        for name, array in self.arrays.items():
            packed.add(name, array)
        if not self.greedy:
            drawn = [0.0 if place.params.greedy else place.rng.random() for place in places]
            packed.add("uniform", np.array(drawn))
        if self.masked:
            masks = [constraint.mask() for number in self.masked if (constraint := places[number].constraint)]
            packed.add("words", _padded(masks, self._vocab))
        return _pack_seen(packed, [places[number] for number in self.penalized], histories) if self.penalized else 0


def _padded(masks: Sequence[UInt32], vocab: int) -> Int32:
    """Masks int32 [n, ⌈vocab / 32⌉], nothing allowed beyond their ends: one kernel then serves every tokenizer."""
    words = np.zeros((len(masks), -(-vocab // 32)), np.int32)
    for row, mask in zip(words, masks, strict=True):
        size = min(len(row), len(mask))
        row[:size] = mask[:size].view(np.int32)
    return words


def _key(vocab: int, places: Sequence[Place]) -> tuple[list[Any], list[SamplingParams]]:
    """(numbers, rules): equal numbers and the same rules stand for the same arrays."""
    numbers: list[Any] = [vocab]
    for place in places:
        numbers += (place.row, place.constraint is None, place.logprobs is None)
    return numbers, [place.params for place in places]


def _pack_seen(packed: Packed, places: Sequence[Place], histories: DeviceHistories) -> int:
    """Adds what was seen before places with penalties; gives the size of the longest history."""
    kept = [history for place in places if (history := place.history) is not None]
    assert len(kept) == len(places)
    every = list(dict.fromkeys(kept))
    begins = histories.pack(packed, every)
    if len(every) < len(kept):
        begin_of = dict(zip(every, begins.tolist(), strict=True))
        begins = np.array([begin_of[history] for history in kept], np.int64)
    sizes = [history.size for history in kept]
    packed.add("begins", begins)
    packed.add("sizes", np.array(sizes, np.int64))
    if width := max(len(set(place.ahead)) for place in places):
        ids, counts = np.full((len(places), width), -1, np.int32), np.zeros((len(places), width), np.float32)
        for number, (place, history) in enumerate(zip(places, kept, strict=True)):
            for column, token in enumerate(dict.fromkeys(place.ahead)):
                ids[number, column], counts[number, column] = token, history.count(token) + place.ahead.count(token)
        packed.add("ahead.ids", ids)
        packed.add("ahead.counts", counts)
    return max(sizes)


def adjust(logits: torch.Tensor, packed: Packed, histories: DeviceHistories, work: Work, widest: int) -> torch.Tensor:
    """Logits f32 [R, vocab] after bias and penalties, as `distribution.adjusted`: in place, or of a copy of some rows.

    `widest`: what `Standing.pack` gave. Masks are left to `Work.choose`.
    """
    x = logits if (copied := packed.get("copied")) is None else logits.index_select(0, copied)
    if (biased := packed.get("biased")) is not None:
        x.view(-1).index_add_(0, biased, packed["bias"])  # each id of a row once
    if (rows := packed.get("penalized")) is not None:
        histories.update(packed)
        entries = packed["begins"], packed["sizes"], packed["penalties"], histories.table, widest
        work.penalize(x, SeenRows(rows, *entries, packed.get("ahead.ids"), packed.get("ahead.counts")))
    return x
