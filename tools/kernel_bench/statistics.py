"""What repeated measurements say."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import median

L2_BYTES = 64 * 2**20  # at least as large as any GPU's that is measured here
TURNOVER = 4  # a rotation of inputs is so many times larger than the L2 cache
MOST_COPIES = 64


@dataclass(frozen=True)
class Timing:
    """Microseconds of one launch, over several replays of many launches each."""

    median: float
    least: float
    spread: float  # (most − least) / median: what noise there was


def summarise(times: Sequence[float]) -> Timing:
    """The timing of at least one measurement. Raises ValueError for none."""
    if not times:
        raise ValueError("nothing was measured")
    middle = median(times)
    return Timing(middle, min(times), (max(times) - min(times)) / middle)


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive values: doubling any of them counts the same."""
    return exp(sum(map(log, values)) / len(values))


def copies_for(nbytes: int) -> int:
    """Sets of inputs to rotate through, so that what a launch reads is no longer in the L2 cache.

    One for small calls: their inputs are in the cache in a model, too.
    """
    if nbytes < 2**21:
        return 1
    return min(MOST_COPIES, -(-TURNOVER * L2_BYTES // nbytes))


def rounds_for(microseconds: float, calls: int, wanted: float = 5000.0) -> int:
    """How often to go through `calls` launches of so many µs each to be busy for `wanted` µs; at most 1000 launches."""
    return max(1, min(1000 // max(1, calls), round(wanted / max(1e-3, microseconds * calls))))
