"""Logprobs of rows of logits that lie on a device: a few numbers a row, which come to the host with the tokens."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch

from angelforge.runtime.device_transfer import Parcel
from angelforge.runtime.device_work import Work
from angelforge.runtime.logprobs import TokenLogprob, require_finite


def measure(
    work: Work, logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, count: int, parcel: Parcel
) -> None:
    """Puts into `parcel` what `told` needs of `rows` int64 [m] of the raw logits f32 [R, vocab].

    `tokens` int64 [m] are those of the rows (−1: none), `count` that of the likeliest tokens.
    """
    found = work.measure(logits, rows, tokens, count)
    for field in fields(found):
        parcel.add(field.name, getattr(found, field.name))


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
