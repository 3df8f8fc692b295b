"""Where each weight of an engine lies on the device, what of it a rank needs, and in which pieces it is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from angelforge.dtypes import DType
from angelforge.errors import AngelForgeError
from angelforge.tensorfile import TensorInfo

ALIGNMENT = 256  # bytes between the begins of two weights are a multiple of this
_SHOWN = 8  # mismatches told in one message
# Runs that a rank needs of a tensor and that are at least so long are read by themselves; shorter ones are cut out of
# whole rows, since a call of the system costs as much as reading some 20 kB.
_LONG_RUN = 64 << 10


@dataclass(frozen=True)
class Slice:
    """What a rank takes of a tensor: indices `start` to `stop` (not included) of `axis`."""

    axis: int
    start: int
    stop: int


#: What a rank takes of each tensor, by name; names that are missing are taken whole. Several slices of one tensor are
#: of one axis and stand behind one another in the rank's tensor (the heads of q, of k and of v in the fused weight).
Slices = Mapping[str, Sequence[Slice]]


@dataclass(frozen=True)
class Wanted:
    """What an engine says of an input."""

    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """One weight: `offset` and `nbytes` in the device's arena, and its origin."""

    info: TensorInfo
    slices: tuple[Slice, ...]  # empty: the whole tensor
    offset: int
    nbytes: int


@dataclass(frozen=True)
class WeightLayout:
    """All weights of an engine. Two names of one origin (a tied head) share a place."""

    placements: Mapping[str, Placement]
    nbytes: int  # of the arena


@dataclass(frozen=True)
class Piece:
    """Bytes to be read at once, and where they go.

    `nbytes` from `offset` of the file are rows of `row` bytes, of which the byte ranges `runs` are kept, one after
    another; they go to `target` of the arena. Without `runs` everything is kept.
    """

    path: Path
    offset: int
    nbytes: int
    target: int
    row: int = 0
    runs: tuple[tuple[int, int], ...] = ()

    @property
    def kept(self) -> int:
        """Bytes that go to the device."""
        if not self.runs:
            return self.nbytes
        return self.nbytes // self.row * sum(end - begin for begin, end in self.runs)


def place_weights(tensors: Mapping[str, TensorInfo], wanted: Mapping[str, Wanted], slices: Slices) -> WeightLayout:
    """Places every wanted weight, files in the order in which they are read.

    Raises:
        AngelForgeError: names, types or shapes of the files are not those of the engine; all in one message.
    """
    problems = [text for name, need in wanted.items() if (text := _mismatch(name, tensors.get(name), need, slices))]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise AngelForgeError(
            f"The weights do not fit the engine: {'; '.join(problems[:_SHOWN])}{more}. Build the engine again from "
            "this bundle, or export the bundle again."
        )
    placements: dict[str, Placement] = {}
    places: dict[tuple[Path, int, int, tuple[Slice, ...]], Placement] = {}
    end = 0
    for name in sorted(wanted, key=lambda name: (tensors[name].path, tensors[name].offset)):
        info, cut = tensors[name], tuple(slices.get(name, ()))
        origin = (info.path, info.offset, info.nbytes, cut)
        if origin not in places:
            nbytes = math.prod(_sliced(info.shape, cut)) * info.dtype.itemsize
            places[origin] = Placement(info, cut, end, nbytes)
            end += -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT  # an empty one has an address of its own, too
        placements[name] = places[origin]
    return WeightLayout(placements, end)


def pieces_of(placement: Placement, most: int) -> Iterator[Piece]:
    """A weight in pieces of at most `most` bytes."""
    info = placement.info
    if not placement.slices:
        yield from _run(info, 0, placement.nbytes, placement.offset, most)
        return
    axis = placement.slices[0].axis
    rows = math.prod(info.shape[:axis])
    inner = math.prod(info.shape[axis + 1 :]) * info.dtype.itemsize
    row = info.shape[axis] * inner
    runs = tuple((cut.start * inner, cut.stop * inner) for cut in placement.slices)
    target = placement.offset
    widest = max(row, sum(end - begin for begin, end in runs))  # slices may overlap and keep more than a row
    if widest > most or min(end - begin for begin, end in runs) >= _LONG_RUN:
        for index in range(rows):
            for begin, end in runs:
                yield from _run(info, index * row + begin, end - begin, target, most)
                target += end - begin
        return
    at_once = most // widest
    for first in range(0, rows, at_once):
        count = min(at_once, rows - first)
        piece = Piece(info.path, info.offset + first * row, count * row, target, row, runs)
        yield piece
        target += piece.kept


def _run(info: TensorInfo, begin: int, nbytes: int, target: int, most: int) -> Iterator[Piece]:
    for done in range(0, nbytes, most):
        yield Piece(info.path, info.offset + begin + done, min(most, nbytes - done), target + done)


def _mismatch(name: str, info: TensorInfo | None, need: Wanted, slices: Slices) -> str | None:
    if info is None:
        return f"{name} is missing"
    cut = tuple(slices.get(name, ()))
    if problem := _bad_slices(info.shape, cut):
        return f"{name} {list(info.shape)} {problem}"
    found = _sliced(info.shape, cut)
    if info.dtype is not need.dtype or found != need.shape:
        part = " (this rank's part)" if cut else ""
        return f"{name} is {info.dtype.value} {list(found)}{part}, needed {need.dtype.value} {list(need.shape)}"
    return None


def _bad_slices(shape: tuple[int, ...], cut: tuple[Slice, ...]) -> str | None:
    for one in cut:
        if one.axis != cut[0].axis or not 0 <= one.axis < len(shape):
            return f"cannot be cut along the axes {sorted({other.axis for other in cut})}"
        if not 0 <= one.start < one.stop <= shape[one.axis]:
            return f"has no indices {one.start} to {one.stop} in axis {one.axis}"
    return None


def _sliced(shape: tuple[int, ...], cut: tuple[Slice, ...]) -> tuple[int, ...]:
    if not cut:
        return shape
    axis = cut[0].axis
    return (*shape[:axis], sum(one.stop - one.start for one in cut), *shape[axis + 1 :])
