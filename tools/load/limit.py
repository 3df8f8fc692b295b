"""The physical limit beside which figures stand."""

from __future__ import annotations

from collections.abc import Sequence

from angelforge.engines.decode_limit import decode_limit
from angelforge.engines.footprint import kv_bytes_per_token, weight_bytes
from angelforge.manifest import Manifest
from angelforge.targets import Target
from angelforge.tools.load.figures import Sample


def limit_of(manifest: Manifest, target: Target, batch: int, samples: Sequence[Sample]) -> float | None:
    """Tokens per second that the memory of a target allows at this batch, without a draft; None where unknown.

    The context is the mean of the requests when half of their output is there.
    """
    if target.bandwidth is None or not samples:
        return None
    weights = weight_bytes(manifest.model, manifest.precision, manifest.max_context)
    kv = kv_bytes_per_token(manifest.model, manifest.precision.activation)
    context = round(sum(sample.prompt_tokens + sample.tokens / 2 for sample in samples) / len(samples))
    return decode_limit(manifest.model, weights, kv, target.bandwidth, batch, context).tokens_per_second
