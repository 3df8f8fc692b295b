"""Random packed batches over a paged pool, for the tests of attention's operators."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

GARBAGE = np.nan  # in every place of the pool that no sequence's keys stand in


@dataclass(frozen=True)
class Shape:
    """Sizes that a model fixes."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    page_size: int = 16
    dtype: type = np.float32

    @property
    def scale(self) -> float:
        """1/√head_dim"""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True)
class Call:
    """One packed call: for each sequence the keys in the cache before it and its new tokens; and padding."""

    sequences: tuple[tuple[int, int], ...]  # (history, tokens)
    padding_tokens: int = 0
    spare_pages: int = 2
    seed: int = 0

    @property
    def lengths(self) -> list[int]:
        """Keys of each sequence after the call; 0 for one without tokens."""
        return [history + tokens if tokens else 0 for history, tokens in self.sequences]


def attention_inputs(call: Call, shape: Shape) -> tuple[np.ndarray, ...]:
    """PagedAttention's inputs: normal values, pages in random order, NaN wherever nothing is to be read."""
    rng = np.random.default_rng(call.seed)
    lengths = call.lengths
    needed = [-(-length // shape.page_size) for length in lengths]
    pages = 1 + sum(needed) + call.spare_pages
    order = rng.permutation(np.arange(1, pages))
    width = max([*needed, 1]) + 1
    table = rng.integers(-(2**31), 2**31, (len(lengths), width), dtype=np.int64).astype(np.int32)  # garbage beyond
    pool = np.full((pages, 2, shape.kv_heads, shape.page_size, shape.head_dim), GARBAGE, np.float32)
    for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        own, order = order[:count], order[count:]
        table[row, :count] = own
        for place in range(length):
            page, offset = own[place // shape.page_size], place % shape.page_size
            pool[page, :, :, offset] = rng.standard_normal((2, shape.kv_heads, shape.head_dim))
    counts = [tokens for _, tokens in call.sequences]
    total = sum(counts) + call.padding_tokens
    positions = np.concatenate(
        [np.arange(length - tokens, length) for length, tokens in zip(lengths, counts, strict=True)]
        + [rng.integers(-5, 10, call.padding_tokens)]
    )
    query = rng.standard_normal((total, shape.heads, shape.head_dim)).astype(np.float32)
    return (
        query.astype(shape.dtype),
        pool.astype(shape.dtype),
        table,
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        np.array(lengths, np.int32),
        positions.astype(np.int32),
    )


BF16 = ml_dtypes.bfloat16
