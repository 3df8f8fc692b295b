"""How far apart two tensors are, in the figures that reports show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Worst:
    """One element: where it is, and what both sides have there."""

    index: tuple[int, ...]
    expected: float
    found: float


@dataclass(frozen=True)
class Difference:
    """Of `found` from `expected`, two tensors of one shape."""

    shape: tuple[int, ...]
    max_error: float  # largest |found − expected|
    relative_error: float  # the same over the largest |expected|
    cosine: float  # of the two as vectors; 1 where both are 0, 0 where a value is not finite
    differing: float  # share of elements that are not equal
    worst: tuple[Worst, ...]  # the elements that differ most, worst first

    @property
    def finite(self) -> bool:
        """Whether the difference is a number."""
        return bool(np.isfinite(self.relative_error))


def difference(found: Array, expected: Array, most: int = 3) -> Difference:
    """Compares two tensors of equal shape in f64; NaN and infinity on one side only are an infinite error."""
    had, wanted = (np.asarray(a).astype(np.float64) for a in (found, expected))
    if had.shape != wanted.shape:
        return Difference(tuple(wanted.shape), np.inf, np.inf, 0.0, 1.0, ())
    if wanted.size == 0:
        return Difference(tuple(wanted.shape), 0.0, 0.0, 1.0, 0.0, ())
    same = (had == wanted) | (np.isnan(had) & np.isnan(wanted))
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.where(same, 0.0, np.abs(had - wanted))
    error = np.where(np.isnan(error), np.inf, error)
    largest = np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0)
    top = float(error.max())
    relative = top / float(largest) if largest else (0.0 if top == 0 else np.inf)
    worst = tuple(Worst(p, float(wanted[p]), float(had[p])) for p in _largest(error, most)) if top else ()
    return Difference(tuple(wanted.shape), top, relative, _cosine(had, wanted), float((~same).mean()), worst)


def by_row(found: Array, expected: Array) -> Array:
    """f64 [T]: the largest error of each row [...] of [T, ...] over that row's largest |expected|, two of equal shape.

    A tensor's relative error is blind where one token is far larger than the others. Infinite where not finite.
    """
    had, wanted = (np.asarray(a).astype(np.float64).reshape(len(a), -1) for a in (found, expected))
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        error = np.where((had == wanted) | (np.isnan(had) & np.isnan(wanted)), 0.0, np.abs(had - wanted))
        top = error.max(axis=1, initial=0.0)
        largest = np.abs(np.where(np.isfinite(wanted), wanted, 0.0)).max(axis=1, initial=0.0)
        rows = np.where(top == 0, 0.0, top / largest)
    return np.where(np.isnan(rows), np.inf, rows)


def _largest(error: Array, most: int) -> list[tuple[int, ...]]:
    """Where the `most` largest errors above 0 are, largest first, the first of equal ones first."""
    flat = error.ravel()
    least = np.partition(flat, -most)[-most] if flat.size > most else 0.0
    order = np.flatnonzero((flat >= least) & (flat > 0))
    order = order[np.argsort(-flat[order], kind="stable")][:most]
    return [tuple(int(i) for i in np.unravel_index(place, error.shape)) for place in order]


def _cosine(had: Array, wanted: Array) -> float:
    a, b = had.ravel(), wanted.ravel()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return 0.0
    norms = float(np.sqrt((a * a).sum()) * np.sqrt((b * b).sum()))  # no BLAS: its threads would wait for each other
    if norms == 0.0:
        return 1.0 if not a.any() and not b.any() else 0.0
    return float(np.clip((a * b).sum() / norms, -1.0, 1.0))


def log_softmax(logits: Array) -> Array:
    """Natural logarithms of the softmax over the last axis, f64."""
    wide = np.asarray(logits, np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


@dataclass(frozen=True)
class LogitRow:
    """How one position's logits compare."""

    sequence: int
    position: int
    error: float  # largest |difference|
    kl: float  # KL(expected ‖ found), nats
    top1: bool  # the same best token
    top5: float  # share of the five best that both have


def logit_rows(found: Array, expected: Array, rows: tuple[tuple[int, int], ...]) -> list[LogitRow]:
    """Compares logits [R, vocab] row by row; `rows` are (sequence, position) of each; KL of NaN is NaN."""
    with np.errstate(invalid="ignore"):
        wanted, had = log_softmax(expected), log_softmax(found)
        kl = np.maximum((np.exp(wanted) * (wanted - had)).sum(axis=-1), 0.0)
        error = np.abs(np.asarray(found, np.float64) - expected).max(axis=-1)
    first = found.argmax(axis=-1) == expected.argmax(axis=-1)
    k = min(5, found.shape[-1])
    best = [np.argpartition(-np.asarray(side), k - 1, axis=-1)[:, :k] for side in (found, expected)]
    shared = [len(set(a.tolist()) & set(b.tolist())) / k for a, b in zip(*best, strict=True)]
    return [LogitRow(s, p, float(error[i]), float(kl[i]), bool(first[i]), shared[i]) for i, (s, p) in enumerate(rows)]
