"""What is run through both sides: sequences of token ids, cut into the packed calls of a real schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from angelforge.bundle import Bundle
from angelforge.errors import UsageError
from angelforge.runtime.batch import INPUTS, Batch, Int64
from angelforge.runtime.packing import Padding, Piece, pack


@dataclass(frozen=True, eq=False)
class Step:
    """A packed call and whose its rows of logits are."""

    batch: Batch
    rows: tuple[tuple[int, int], ...]  # (sequence, position) of every row of logits that counts


@dataclass(frozen=True, eq=False)
class Schedule:
    """Packed calls that compute every position of some sequences once."""

    sequences: tuple[Int64, ...]
    steps: tuple[Step, ...]
    num_pages: int  # of the pool, page 0 included

    @property
    def positions(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))


def random_sequences(count: int, vocab_size: int, length: int = 48, seed: int = 0) -> list[Int64]:
    """`count` sequences of random ids, of unequal lengths around `length`."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(max(length * 3 // 4, 1), max(length * 5 // 4, 2), count)
    return [rng.integers(0, vocab_size, size).astype(np.int64) for size in sizes]


def schedule(
    sequences: Sequence[Sequence[int] | Int64],
    *,
    page_size: int,
    vocab_size: int,
    max_context: int,
    chunk: int = 40,
    padding: int = 3,
    seed: int = 0,
) -> Schedule:
    """All sequences side by side in chunks of at most `chunk` tokens a call, with padding behind each.

    Pages are handed out in random order, so that neighbouring pages of a sequence are no neighbours in the pool. The
    chunk need not divide the page: calls end and begin inside pages, at their borders and beyond.

    Raises:
        UsageError: no sequence, an empty one, ids outside the vocabulary, or more positions than the bundle covers.
    """
    ids = [np.asarray(sequence, np.int64) for sequence in sequences]
    if not ids or any(len(sequence) == 0 for sequence in ids):
        raise UsageError("There is a sequence without tokens; each needs at least one.")
    for number, sequence in enumerate(ids):
        if sequence.min() < 0 or sequence.max() >= vocab_size:
            raise UsageError(f"Sequence {number} holds ids outside 0 … {vocab_size - 1}.")
        if len(sequence) > max_context:
            raise UsageError(
                f"Sequence {number} has {len(sequence)} tokens, but the bundle covers {max_context} positions. "
                "Take fewer, or export with --rope-scaling."
            )
    counts = [-(-len(sequence) // page_size) for sequence in ids]
    num_pages = 1 + sum(counts)
    order = np.random.default_rng(seed).permutation(np.arange(1, num_pages)).astype(np.int32)
    pages = np.split(order, np.cumsum(counts)[:-1])
    steps, starts = [], [0] * len(ids)
    while any(start < len(sequence) for start, sequence in zip(starts, ids, strict=True)):
        pieces, rows, room = [], [], chunk
        for number, sequence in enumerate(ids):
            start = starts[number]
            part = sequence[start : start + room]
            if len(part) == 0:
                continue
            pieces.append(Piece(part, start, pages[number], len(part)))
            rows += [(number, start + offset) for offset in range(len(part))]
            starts[number], room = start + len(part), room - len(part)
        tokens, widest = len(rows), max(counts)
        size = Padding(tokens + padding, len(pieces) + (padding > 0), widest, tokens)
        steps.append(Step(pack(pieces, page_size, size), tuple(rows)))
    return Schedule(tuple(ids), tuple(steps), num_pages)


def feed_dicts(bundle: str | Path, count: int = 2, length: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """`count` packed calls for Polygraphy's `--data-loader-script`, each a prompt of its own with empty f32 pools."""
    opened = Bundle.open(bundle)
    manifest, model = opened.manifest, opened.manifest.model
    found = []
    for ids in random_sequences(count, model.vocab_size, length, seed):
        planned = schedule(
            [ids],
            page_size=manifest.page_size,
            vocab_size=model.vocab_size,
            max_context=manifest.max_context,
            chunk=len(ids),
        )
        batch = planned.steps[0].batch
        shape = (planned.num_pages, 2, model.num_key_value_heads, manifest.page_size, model.head_dim)
        pools = {f"kv_cache.{i}": np.zeros(shape, np.float32) for i in range(model.num_hidden_layers)}
        found.append({**{name: getattr(batch, name) for name in INPUTS}, **pools})
    return found
