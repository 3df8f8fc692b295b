"""Logprobs of rows of logits that lie on a device: a few numbers a row, which come to the host with the tokens."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch

from angelforge.runtime.device_transfer import Parcel
from angelforge.runtime.device_work import Measured, Work
from angelforge.runtime.logprobs import TokenLogprob, require_finite

_ROWS = 128  # that are measured at once: a longer prompt's take no more memory


def measure(
    work: Work, logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, count: int, parcel: Parcel
) -> None:
    """Puts into `parcel` what `told` needs of `rows` int64 [m] of the raw logits f32 [R, vocab].

    `tokens` int64 [m] are those of the rows (−1: none), `count` that of the likeliest tokens.
    """
    begins = range(0, rows.shape[0], _ROWS)
    parts = [work.measure(logits, rows[at : at + _ROWS], tokens[at : at + _ROWS], count) for at in begins]
    for field in fields(Measured):
        each = [getattr(part, field.name) for part in parts]
        parcel.add(field.name, each[0] if len(each) == 1 else torch.cat(each))


def told(found: dict[str, Any], number: int, token: int, count: int) -> TokenLogprob:
    """The logprob of the token of a measured row, with the `count` likeliest.

    `found` is what the parcel brought. Raises AngelForgeError where they are not finite.
    """
    with np.errstate(invalid="ignore"):
        total = float(found["peak"][number]) + float(np.log(found["total"][number]))
    require_finite(total)
    pairs = zip(found["values"][number].tolist(), found["ids"][number].tolist(), strict=True)
    ordered = sorted((-value, other) for value, other in pairs)[:count]
    return TokenLogprob(
        token, float(found["logit"][number]) - total, tuple((other, -value - total) for value, other in ordered)
    )
