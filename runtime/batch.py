"""One packed call of an engine: the bookkeeping inputs of the graph, without a batch axis."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from angelforge.errors import AngelForgeError

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

# Comparing with a type makes it a dtype first, which takes longer than the rest of a check.
_DTYPES = {np.int32: np.dtype(np.int32), np.int64: np.dtype(np.int64)}


@dataclass(frozen=True, eq=False)
class Batch:
    """T tokens of B sequences over a paged KV pool; the fields are the graph's inputs of the same name.

    Rows from `num_tokens` on are padding: they write to page 0 and their results are ignored. Creating a batch checks
    shapes and types (a wrong one raises AngelForgeError); `check` also checks every value.
    """

    input_ids: Int64  # [T] new tokens of all sequences, one after another
    positions: Int32  # [T] position of each in its sequence
    num_tokens: Int32  # [1] rows from here on are padding
    query_start: Int32  # [B+1] where each sequence's tokens begin; equal neighbours are an empty sequence
    kv_length: Int32  # [B] tokens in the cache after this call; 0 for an empty sequence
    page_table: Int32  # [B, P] physical pages of each sequence; entries past ⌈kv_length / page_size⌉ are ignored
    slots: Int32  # [T] page · page_size + offset where each new key and value goes
    logit_indices: Int64  # [R] rows that need logits

    def __post_init__(self) -> None:
        _expect("input_ids", self.input_ids, np.int64, (None,))
        tokens = self.input_ids.shape[0]
        if tokens < 1:
            raise AngelForgeError("Batch.input_ids is empty, but a call needs at least one token.")
        _expect("kv_length", self.kv_length, np.int32, (None,))
        sequences = self.kv_length.shape[0]
        _expect("positions", self.positions, np.int32, (tokens,))
        _expect("num_tokens", self.num_tokens, np.int32, (1,))
        _expect("query_start", self.query_start, np.int32, (sequences + 1,))
        _expect("page_table", self.page_table, np.int32, (sequences, None))
        _expect("slots", self.slots, np.int32, (tokens,))
        _expect("logit_indices", self.logit_indices, np.int64, (None,))

    def check(self, vocab_size: int, page_size: int, num_pages: int, max_context: int) -> None:
        """Raises AngelForgeError if any value breaks the contract of the graph's inputs for such an engine."""
        tokens, real, table = self.input_ids.shape[0], int(self.num_tokens[0]), self.page_table
        counts = np.diff(self.query_start)
        _require(0 <= real <= tokens, "num_tokens lies within the packed rows")
        _require(
            self.query_start[0] == 0 and self.query_start[-1] == real and bool((counts >= 0).all()),
            "query_start rises from 0 to num_tokens",
        )
        _require(_within(self.input_ids, 0, vocab_size), "input_ids are ids of the vocabulary")
        _require(_within(self.logit_indices, 0, tokens), "logit_indices are packed rows")
        _require(bool((self.kv_length[counts == 0] == 0).all()), "an empty sequence has kv_length 0")
        _require(_within(self.kv_length, 0, max_context + 1), "kv_length fits the context")
        _require(bool((self.slots[real:] // page_size == 0).all()), "padding rows write to page 0")
        used = -(-self.kv_length // page_size)  # [B]
        _require(bool((used <= table.shape[1]).all()), "page_table has a column for every page in use")
        pages = table[np.arange(table.shape[1]) < used[:, None]]
        _require(_within(pages, 1, num_pages), "pages in use exist and are not page 0")
        owner = np.repeat(np.arange(counts.shape[0]), counts)  # [num_tokens] sequence of each row
        positions, slots = self.positions[:real], self.slots[:real]
        inside = (positions >= 0) & (positions < self.kv_length[owner])
        _require(bool(inside.all()), "positions lie below their sequence's kv_length")
        expected = table[owner, positions // page_size] * page_size + positions % page_size
        _require(bool((slots == expected).all()), "slots agree with page_table and positions")
        _require(np.unique(slots).shape[0] == real, "no two rows write the same slot")


def _expect(name: str, array: npt.NDArray[np.generic], dtype: type[np.generic], shape: tuple[int | None, ...]) -> None:
    # `shape` may leave an axis open with None. Called eight times a step: the good case costs a comparison or two.
    if (
        isinstance(array, np.ndarray)
        and array.dtype == _DTYPES[dtype]
        and (array.shape == shape or (array.ndim == len(shape) and _agree(shape, array.shape)))
    ):
        return
    found = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
    wanted_axes = ", ".join("any" if axis is None else str(axis) for axis in shape)
    raise AngelForgeError(f"Batch.{name} is {found}, but {np.dtype(dtype)}[{wanted_axes}] was expected.")


def _agree(shape: tuple[int | None, ...], found: tuple[int, ...]) -> bool:
    return all(wanted is None or wanted == size for wanted, size in zip(shape, found, strict=True))


def _within(values: npt.NDArray[np.integer], low: int, high: int) -> bool:
    return bool(((values >= low) & (values < high)).all())


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise AngelForgeError(f"The packed call breaks a rule of the graph's inputs: {rule}.")


INPUTS = tuple(field.name for field in fields(Batch))  # names of the graph's bookkeeping inputs
