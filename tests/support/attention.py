"""Random packed batches over a paged pool, for the tests of attention's operators, and attention in NumPy."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16
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


@dataclass(frozen=True, eq=False)
class Inputs:
    """PagedAttention's inputs, in its order."""

    query: np.ndarray
    kv_cache: np.ndarray
    page_table: np.ndarray
    query_start: np.ndarray
    kv_length: np.ndarray
    positions: np.ndarray

    def arrays(self) -> tuple[np.ndarray, ...]:
        """In the operator's order."""
        return (
            self.query,
            self.kv_cache,
            self.page_table,
            self.query_start,
            self.kv_length,
            self.positions,
        )

    def keys_and_values(self, sequence: int) -> tuple[np.ndarray, np.ndarray]:
        """f32 [Hkv, L, D] each, gathered from the pages."""
        length = int(self.kv_length[sequence])
        page_size = self.kv_cache.shape[3]
        places = np.arange(length)
        rows = self.kv_cache[self.page_table[sequence, places // page_size], :, :, places % page_size]  # [L, 2, Hkv, D]
        keys, values = rows.astype(np.float32).transpose(1, 2, 0, 3)
        return keys, values


def attention_inputs(call: Call, shape: Shape) -> Inputs:
    """Normal values, pages in random order, NaN and garbage wherever nothing is to be read."""
    rng = np.random.default_rng(call.seed)
    lengths = call.lengths
    needed = [-(-length // shape.page_size) for length in lengths]
    pages = 1 + sum(needed) + call.spare_pages
    order = rng.permutation(np.arange(1, pages))
    width = max([*needed, 1]) + 1
    table = rng.integers(-(2**31), 2**31, (len(lengths), width), dtype=np.int64).astype(np.int32)
    pool = np.full((pages, 2, shape.kv_heads, shape.page_size, shape.head_dim), GARBAGE, np.float32)
    for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        own, order = order[:count], order[count:]
        table[row, :count] = own
        for place in range(length):
            page, offset = own[place // shape.page_size], place % shape.page_size
            pool[page, :, :, offset] = rng.standard_normal((2, shape.kv_heads, shape.head_dim))
    counts = [tokens for _, tokens in call.sequences]
    total = sum(counts) + call.padding_tokens
    places = [np.arange(length - tokens, length) for length, tokens in zip(lengths, counts, strict=True)]
    return Inputs(
        query=rng.standard_normal((total, shape.heads, shape.head_dim)).astype(shape.dtype),
        kv_cache=pool.astype(shape.dtype),
        page_table=table,
        query_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        kv_length=np.array(lengths, np.int32),
        positions=np.concatenate([*places, rng.integers(-5, 10, call.padding_tokens)]).astype(np.int32),
    )


def attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray, visible: np.ndarray, scale: float) -> np.ndarray:
    """f32 [t, Hq, D] of query [t, Hq, D] over keys and values [Hkv, L, D] that are visible [t, L], in float64."""
    result, _lse = attend_part(query, keys, values, visible, scale)
    return result


def attend_part(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, visible: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """(result f32 [t, Hq, D], log Σ exp of the scores f32 [t, Hq]): 0 and −inf where nothing is visible."""
    group = query.shape[1] // keys.shape[0]
    wide = query.astype(np.float64)
    k, v = (np.repeat(x.astype(np.float64), group, axis=0) for x in (keys, values))  # [Hq, L, D]
    scores = np.einsum("thd,hld->thl", wide, k) * scale
    powers = np.where(visible[:, None], np.exp(np.clip(scores, -700, 700)), 0.0)
    total = powers.sum(2)
    with np.errstate(divide="ignore", invalid="ignore"):
        mixed = np.einsum("thl,hld->thd", powers, v) / total[..., None]
        return np.nan_to_num(mixed).astype(np.float32), np.log(total).astype(np.float32)
