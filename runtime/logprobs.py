"""Logprobs: natural logarithms of the softmax of the raw logits, before any sampling option."""

from __future__ import annotations

from dataclasses import dataclass

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


def row_logprob(logits: Float32, token: int, count: int) -> TokenLogprob:
    """Of a token by its row of logits f32 [vocab] on the host, with the `count` likeliest; ties by the lower id.

    Raises AngelForgeError where the logits are not finite numbers. On a device `device_logprobs` does the same.
    """
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
