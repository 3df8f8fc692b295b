"""One round of choosing on a device: what goes there, what is computed, what is made of what comes back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from angelforge.runtime.batch import Int64
from angelforge.runtime.device_adjusting import Place, Standing, adjusted_rows, pack_adjustments
from angelforge.runtime.device_distribution import Rules, draw_rows, kept_weights
from angelforge.runtime.device_history import DeviceHistories
from angelforge.runtime.device_largest import (
    RowRules,
    candidates_of,
    draw_each,
    ids_of,
    is_narrow,
    largest_of,
)
from angelforge.runtime.device_logprobs import measure, pack_rows
from angelforge.runtime.device_transfer import Packed, Parcel
from angelforge.runtime.sampler import is_argmax
from angelforge.runtime.sampling import SamplingParams

_ROWS = 64  # that are drawn from at once: the running sums alone take twice the memory of their logits


@dataclass(frozen=True)
class Scored:
    """A row whose token is known already, a prompt's."""

    row: int
    token: int
    count: int  # of the likeliest tokens that are told beside it


class Round:
    """Rows of one step's logits sorted by what has to be done for them.

    `draws` are places that give a token, `scored` those of prompts. Each row has one place.
    """

    def __init__(self, shape: Sequence[int], draws: Sequence[Place], scored: Sequence[Scored]) -> None:
        """Of logits [R, vocab]."""
        self.shape, self.draws, self.scored = shape, draws, scored
        vocab = shape[1]
        self.best: list[int] = []  # of the draws, as the next two
        self.narrow: list[int] = []
        self.whole: list[int] = []
        for i, place in enumerate(draws):
            if is_argmax(place):
                self.best.append(i)
            else:
                (self.narrow if is_narrow(place.params, vocab) else self.whole).append(i)
        self.looked = [draws[i] for i in self.narrow]  # places whose largest logits come to the host
        self.drawn = [draws[i] for i in self.whole]
        self.rules: RowRules | None = None
        # Rows with one token each come first among those that are measured for logprobs.
        self.best_asked = _asking(draws[i] for i in self.best)
        self.whole_asked = _asking(self.drawn)
        self.looked_asked = _asking(self.looked)
        self.measured = [draws[self.best[k]].row for k in self.best_asked]
        self.measured += [self.drawn[k].row for k in self.whole_asked]
        self.measured += [each.row for each in scored]
        self.single = len(self.measured)
        self.measured += [self.looked[k].row for k in self.looked_asked]
        self._as_it_is = True
        self._x: torch.Tensor | None = None

    @property
    def adjusted(self) -> list[Place]:
        """The places whose logits may be changed before anything is chosen."""
        return self.looked + self.drawn

    def pack(self, packed: Packed, histories: DeviceHistories, rules: RowRules | None, standing: Standing) -> None:
        """Adds all that the device has to know; `rules` are those of `looked`, `standing` is of `adjusted`."""
        rows, vocab = self.shape
        self.rules = rules
        if 0 < len(self.best) < rows:
            packed.add("best.rows", np.array([self.draws[i].row for i in self.best], np.int64))
        if self.looked or self.drawn:
            self._as_it_is = not pack_adjustments(packed, standing, self.adjusted, vocab, histories)
        if rules is not None and rules.any_wide:
            packed.add("divisors", rules.divisors)
        if self.drawn:
            pack_rules(packed, self.drawn, vocab)
        if self.measured:
            pack_rows(packed, self.measured)
            packed.add("scored.tokens", np.array([each.token for each in self.scored], np.int64))
            for name, asked, every in (
                ("best.asked", self.best_asked, self.best),
                ("whole.asked", self.whole_asked, self.drawn),
                ("looked.asked", self.looked_asked, self.looked),
            ):
                if 0 < len(asked) < len(every):
                    packed.add(name, np.array(asked, np.int64))

    def compute(self, logits: torch.Tensor, packed: Packed, histories: DeviceHistories) -> Parcel:
        """Hands out all work; nothing is waited for."""
        parcel = Parcel()
        best = table = drawn = None
        if self.best:
            peak, best = _selected(logits, packed, "best.rows").max(1)  # the first of several largest
            parcel.add("best.peak", peak)
            parcel.add("best", best)
        if self.looked or self.drawn:
            self._x = x = logits if self._as_it_is else adjusted_rows(logits, packed, histories)
            if self.rules is not None:
                table = largest_of(x[: len(self.looked)], self.rules, packed.get("divisors"))
                parcel.add("table", table)
            if self.drawn:
                drawn = draw_from_all(x[len(self.looked) :], packed, self.drawn)
                parcel.add("drawn", drawn)
        if self.measured:
            one = [packed["scored.tokens"]]
            if drawn is not None and self.whole_asked:
                one.insert(0, _selected(drawn, packed, "whole.asked"))
            if best is not None and self.best_asked:
                one.insert(0, _selected(best, packed, "best.asked"))
            few = None
            if table is not None and self.rules is not None and self.looked_asked:
                few = _selected(ids_of(table, self.rules.width), packed, "looked.asked").long()
            measure(logits, packed, parcel, self._likeliest(), torch.cat(one), few)
        return parcel

    def settle(self, found: dict[str, Any]) -> Int64:
        """Tokens int64 [draws], from what the parcel brought.

        Rows that the largest logits do not decide are drawn from in a second round, of which only ids come back.
        """
        tokens = np.empty(len(self.draws), np.int64)
        if self.best:
            tokens[self.best] = np.where(np.isfinite(found["best.peak"]), found["best"], -1)
        if self.drawn:
            tokens[self.whole] = found["drawn"]
        if self.rules is not None:
            seen = candidates_of(found["table"], self.rules)
            tokens[self.narrow] = draw_each(seen, self.looked)
            if not seen.decided.all():
                undecided = np.flatnonzero(~seen.decided).tolist()
                tokens[[self.narrow[k] for k in undecided]] = self._draw_again(undecided)
        return tokens

    def _likeliest(self) -> int:
        return max([*(each.count for each in self.scored), *(place.logprobs or 0 for place in self.draws)])

    def _draw_again(self, undecided: Sequence[int]) -> Int64:
        """From the whole vocabulary, where more than the largest logits can come."""
        assert self._x is not None
        packed, parcel = Packed(self._x.device), Parcel()
        places = [self.looked[k] for k in undecided]
        packed.add("again", np.array(undecided, np.int64))
        pack_rules(packed, places, self.shape[1])
        packed.send()
        parcel.add("drawn", draw_from_all(self._x.index_select(0, packed["again"]), packed, places))
        drawn: Int64 = parcel.fetch()["drawn"]
        return drawn


def pack_rules(packed: Packed, places: Sequence[Place], vocab: int) -> None:
    """Adds the rules of places that are drawn from the whole vocabulary, and a number of each one's generator."""
    params = [place.params for place in places]
    top_k = [each.top_k if 0 < each.top_k < vocab else vocab for each in params]
    columns = [[each.temperature for each in params], top_k]
    columns += [[each.top_p for each in params], [each.min_p for each in params]]
    packed.add("rules", np.array(columns, np.float64))
    packed.add("uniform", np.array([0.0 if place.params.greedy else place.rng.random() for place in places]))


def rules_of(packed: Packed, params: Sequence[SamplingParams], vocab: int) -> Rules:
    """What `pack_rules` has sent."""
    temperature, k, p, floor = packed["rules"].unsqueeze(2)  # f64 [n, 1] each
    sampled = [each for each in params if not each.greedy]
    limited = [each.top_k for each in sampled if 0 < each.top_k < vocab]
    return Rules(
        temperature=temperature,
        top_k=k,
        top_p=p,
        min_p=floor,
        largest_k=max(limited, default=0),
        every_nucleus_sorted=all(0 < each.top_k < vocab for each in sampled if each.top_p < 1),
        nucleus=any(each.top_p < 1 for each in sampled),
        floor=any(each.min_p > 0 for each in sampled),
    )


def draw_from_all(x: torch.Tensor, packed: Packed, places: Sequence[Place]) -> torch.Tensor:
    """Ids int64 [n] on the device, drawn from all that the rules keep in the rows of `x` f32 [n, vocab]; −1: none."""
    rules, drawn = rules_of(packed, [place.params for place in places], x.shape[1]), []
    for begin in range(0, x.shape[0], _ROWS):
        some, of_some = x[begin : begin + _ROWS], rules.part(begin, begin + _ROWS)
        best = some.argmax(1, keepdim=True)
        uniform = packed["uniform"][begin : begin + _ROWS].unsqueeze(1)
        ids = draw_rows(kept_weights(some, best, of_some), best, uniform)
        ids = torch.where(of_some.temperature > 0, ids, best)
        drawn.append(ids.masked_fill(~(some.gather(1, best).abs() < torch.inf), -1).squeeze(1))
    return drawn[0] if len(drawn) == 1 else torch.cat(drawn)


def _asking(places: Iterable[Place]) -> list[int]:
    """Which of the places ask for logprobs."""
    return [k for k, place in enumerate(places) if place.logprobs is not None]


def _selected(tensor: torch.Tensor, packed: Packed, name: str) -> torch.Tensor:
    """Some rows; all of them, without a copy, where none were named."""
    rows = packed.get(name)
    return tensor if rows is None else tensor.index_select(0, rows)
