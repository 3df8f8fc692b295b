"""Which optimisation profile a step runs in, and to which size it is padded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from angelforge.engines.profiles import Profile
from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Batch
from angelforge.runtime.packing import Padding


@dataclass(frozen=True)
class Bucket:
    """The exact sizes of a step, and the profile whose kernels serve it best."""

    size: Padding
    profile: int


class Buckets:
    """The sizes of an engine's steps; there are few, since each has an execution context that never sees another one.

    A context whose shapes change loads the kernels of all its plugins anew and keeps the old ones (seen by others in
    TensorRT 11.1 and 11.2, NVIDIA/TensorRT issue 4849): some 400 modules a step, until the memory is full.

    `captured` are for decoding up to `max_batch` sequences: 1, 2, 4, 8, … tokens and rows, each with one token a
    sequence, and with 1 + `depth` where drafts are verified. Other steps are padded to 1, 2, 3, 4, 6, 8, 12, … tokens,
    so that at most a third of a step is padding. The page table has its full width: kernels read lengths on the device,
    so that it costs only its copy (8 kB a sequence at 131,072 positions).
    """

    def __init__(self, profiles: Sequence[Profile], max_batch: int, depth: int) -> None:
        self._profiles = tuple(profiles)
        most = self._profiles[-1]
        batches = [2**i for i in range(max_batch.bit_length()) if 2**i < max_batch] + [max_batch]
        sizes = {
            Padding(batch * each, batch, most.pages_per_sequence.most, batch * each)
            for batch in batches
            for each in {1, 1 + depth}
        }
        self.captured = self._buckets(sizes)
        batch, pages, rows = most.batch.most, most.pages_per_sequence.most, most.logit_rows.most
        self.others = self._buckets(
            Padding(tokens, min(batch, tokens), pages, min(rows, tokens)) for tokens in _ladder(most.tokens.most)
        )

    def choose(self, batch: Batch) -> tuple[Bucket, bool]:
        """The smallest bucket that takes a step, and whether it is a captured one, which come first.

        Raises AngelForgeError where the engine's profiles are too small for it.
        """
        needed = sizes_of(batch)
        for bucket in self.captured:
            if _fits(needed, bucket.size):
                return bucket, True
        for bucket in self.others:
            if _fits(needed, bucket.size):
                return bucket, False
        most = self._profiles[-1]
        raise AngelForgeError(
            f"A step has {needed.tokens} tokens of {needed.sequences} sequences with {needed.rows} rows of logits "
            f"and {needed.pages} pages a sequence, but the engine was built for {most.tokens.most}, "
            f"{most.batch.most}, {most.logit_rows.most} and {most.pages_per_sequence.most}. Build it with a larger "
            "--max-tokens or --max-batch, or run less at once."
        )

    def _buckets(self, sizes: Iterable[Padding]) -> tuple[Bucket, ...]:
        """By rising size, without those that no profile takes."""
        found = [Bucket(size, profile) for size in sizes if (profile := self._profile(size)) is not None]
        return tuple(sorted(found, key=lambda bucket: (bucket.size.tokens, bucket.size.sequences)))

    def _profile(self, size: Padding) -> int | None:
        """The first, smallest, profile that takes such a step."""
        for index, profile in enumerate(self._profiles):
            ranges = (profile.tokens, profile.batch, profile.pages_per_sequence, profile.logit_rows)
            sizes = (size.tokens, size.sequences, size.pages, size.rows)
            if all(each.least <= found <= each.most for each, found in zip(ranges, sizes, strict=True)):
                return index
        return None


def _ladder(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, … below `most`, and `most`."""
    powers = [2**i for i in range(most.bit_length())]
    steps = {*powers, *(3 * power // 2 for power in powers)}
    return [*sorted(size for size in steps if size < most), most]


def sizes_of(batch: Batch) -> Padding:
    """A batch's own sizes, at least 1 each, as profiles need them: a row of logits that nobody wants is row 0's."""
    table = batch.page_table
    return Padding(batch.input_ids.shape[0], max(table.shape[0], 1), max(table.shape[1], 1), max(_rows(batch), 1))


def _rows(batch: Batch) -> int:
    return batch.logit_indices.shape[0]


def _fits(needed: Padding, size: Padding) -> bool:
    return (
        needed.tokens <= size.tokens
        and needed.sequences <= size.sequences
        and needed.pages <= size.pages
        and needed.rows <= size.rows
    )
