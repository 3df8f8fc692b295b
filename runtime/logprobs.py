"""Logprobs: natural logarithms of the softmax of the raw logits, before any sampling option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Float32
from angelforge.runtime.selection import top_ids


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its logprob, and the likeliest tokens at its place with theirs, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def row_logprobs(logits: Any, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
    """Of `tokens` [n] by rows of logits [n, vocab], a NumPy array or a torch tensor, with the `count` likeliest.

    Raises AngelForgeError where a row's logits are not finite numbers, or where their device fails.
    """
    if isinstance(logits, np.ndarray):
        return [_from_array(logits[row], token, count) for row, token in enumerate(tokens)]
    from angelforge.runtime.device import explained_gpu  # they need torch
    from angelforge.runtime.device_logprobs import device_logprobs

    with explained_gpu():
        return device_logprobs(logits, tokens, count) if tokens else []


def _from_array(logits: Float32, token: int, count: int) -> TokenLogprob:
    peak = logits.max()
    with np.errstate(invalid="ignore"):
        weights = np.exp(logits - peak)
    total = float(peak) + float(np.log(weights.sum(dtype=np.float64)))
    require_finite(total)
    ids = top_ids(logits, count)[:count].tolist() if count else []
    return TokenLogprob(token, float(logits[token]) - total, tuple((i, float(logits[i]) - total) for i in ids))


def require_finite(total: float) -> None:
    """Raises AngelForgeError for the logarithm of a sum that no finite logits have."""
    if not np.isfinite(total):
        raise AngelForgeError(
            "The engine computed no finite logits, so there are no logprobs. Check the weights with `inspect --verify`."
        )
