"""What a run under load gave: rates and percentiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99)


@dataclass
class Sample:
    """One request: seconds to its first token, and between pieces of its output from then on."""

    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class Figures:
    """All requests of one concurrency. Times in milliseconds; None where there was nothing to measure."""

    concurrency: int
    drafted: bool
    requests: int
    prompt_tokens: int
    cached_tokens: int  # of the prompts, taken from shared pages
    output_tokens: int
    seconds: float
    tokens_per_second: float
    first_token_ms: dict[str, float] | None  # {"50": …, "90": …, "99": …}
    between_tokens_ms: dict[str, float] | None
    accepted_length: float | None = None  # tokens of a draft's round
    limit_tokens_per_second: float | None = None  # of the target, at this batch and mean context

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def summarize(
    samples: Sequence[Sample],
    concurrency: int,
    drafted: bool,
    seconds: float,
    accepted_length: float | None = None,
    limit: float | None = None,
) -> Figures:
    """The figures of requests that took `seconds` together."""
    tokens = sum(sample.tokens for sample in samples)
    return Figures(
        concurrency=concurrency,
        drafted=drafted,
        requests=len(samples),
        prompt_tokens=sum(sample.prompt_tokens for sample in samples),
        cached_tokens=sum(sample.cached_tokens for sample in samples),
        output_tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        first_token_ms=_percentiles([sample.first for sample in samples]),
        between_tokens_ms=_percentiles([gap for sample in samples for gap in sample.gaps]),
        accepted_length=accepted_length,
        limit_tokens_per_second=limit,
    )


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    values = np.percentile(np.array(seconds) * 1e3, PERCENTILES)
    return {str(percent): float(value) for percent, value in zip(PERCENTILES, values, strict=True)}
