"""One round of choosing on a device: what goes there, what is computed, what is made of what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from angelforge.runtime.device_adjusting import Place, Standing, adjust
from angelforge.runtime.device_history import DeviceHistories
from angelforge.runtime.device_logprobs import measure
from angelforge.runtime.device_transfer import Packed, Parcel
from angelforge.runtime.device_work import Draws, Work


@dataclass(frozen=True)
class Scored:
    """A row whose token is known already, a prompt's."""

    row: int
    token: int
    count: int  # of the likeliest tokens that are told beside it


class Round:
    """Rows of one step's logits: `draws` are places that give a token, `scored` those of prompts. A row has one place.

    Measured for logprobs are those of the draws that ask for them, then the scored ones.
    """

    def __init__(self, draws: Sequence[Place], scored: Sequence[Scored]) -> None:
        self.draws, self.scored = draws, scored
        self._asked = [number for number, place in enumerate(draws) if place.logprobs is not None]
        self.measured = [draws[number].row for number in self._asked] + [each.row for each in scored]
        self._widest = 0

    def pack(self, packed: Packed, histories: DeviceHistories, standing: Standing) -> None:
        """Adds all that the device has to know; `standing` is of the draws."""
        if self.draws:
            self._widest = standing.pack(packed, self.draws, histories)
        if self.measured:
            packed.add("measured", np.array(self.measured, np.int64))
        if 0 < len(self._asked) < len(self.draws):
            packed.add("asked", np.array(self._asked, np.int64))
        if self.scored:
            packed.add("scored", np.array([each.token for each in self.scored], np.int64))

    def compute(self, logits: torch.Tensor, packed: Packed, histories: DeviceHistories, work: Work) -> Parcel:
        """Hands out all work on `logits` f32 [R, vocab], which change; nothing is waited for.

        The parcel has "tokens" int64 [draws] and what `device_logprobs.told` looks at.
        """
        parcel, tokens = Parcel(), []
        if self.draws:
            x = adjust(logits, packed, histories, work, self._widest)
            asks = packed["rows"], packed["rules"], packed["uniform"]
            chosen = work.choose(x, Draws(*asks, packed.get("mask_of"), packed.get("words")))
            parcel.add("tokens", chosen)
            if self._asked:
                asked = packed.get("asked")
                tokens.append(chosen if asked is None else chosen.index_select(0, asked))
        if self.scored:
            tokens.append(packed["scored"])
        if tokens:
            of_rows = tokens[0] if len(tokens) == 1 else torch.cat(tokens)
            measure(work, logits, packed["measured"], of_rows, self._likeliest(), parcel)
        return parcel

    def _likeliest(self) -> int:
        return max([*(each.count for each in self.scored), *(place.logprobs or 0 for place in self.draws)])
