"""A matrix read and quantised one row of blocks at a time: memory depends on its width, not on its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from angelforge.errors import AngelForgeError
from angelforge.exporter.block_fp8 import BlockQuantizer, NotFiniteError
from angelforge.exporter.openfiles import OpenFiles
from angelforge.exporter.pieces import Piece
from angelforge.exporter.quantization_errors import Errors
from angelforge.tensorfile import TensorInfo

Array = npt.NDArray[Any]


class Workspace:
    """Buffers that all pieces of a file share: fresh ones would cost as much as a pass over the data."""

    def __init__(self, block: tuple[int, int]) -> None:
        self.quantizer = BlockQuantizer(block)
        self._bytes = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

    def bytes(self, which: int, size: int) -> Array:
        """`size` bytes of the buffer `which` (0 for weights, 1 for codes); what they held before is lost."""
        if len(self._bytes[which]) < size:
            self._bytes[which] = np.empty(size, np.uint8)
        return self._bytes[which][:size]


@dataclass(frozen=True)
class Strips:
    """A matrix of one piece, or of several below each other, cut into rows of blocks from its upper left corner."""

    pieces: tuple[Piece, ...]  # of equal width
    infos: tuple[TensorInfo, ...]  # where the tensor of each stands
    block: tuple[int, int]
    files: OpenFiles
    workspace: Workspace

    @property
    def width(self) -> int:
        """Columns of the matrix."""
        left, right = self._columns(0)
        return right - left

    @property
    def size(self) -> int:
        """Elements of the matrix."""
        return sum(piece.size for piece in self.pieces)

    @property
    def count(self) -> int:
        """Strips of the matrix; the last one may be lower than a block."""
        return -(-self.size // (self.width * self.block[0]))

    @property
    def name(self) -> str:
        """The checkpoint's tensor, as reports name it."""
        first, more = self.pieces[0].tensor, len(self.pieces) - 1
        return f"{first} and {more} below it" if more else first

    def quantize(self, index: int) -> tuple[Array, Array, Errors]:
        """Codes uint8 [rows, width] (valid until the next call), scales f32 [column blocks] and errors of a strip.

        Raises AngelForgeError naming tensor and position for NaN and infinity.
        """
        stretches = self._stretches(index * self.block[0])
        if len(stretches) == 1:
            weights = self._read(*stretches[0])
        else:  # copied, because the next one is read into the same buffer; every float is an f32
            weights = np.concatenate([self._read(*stretch).astype(np.float32) for stretch in stretches])
        codes = self.workspace.bytes(1, weights.size).reshape(weights.shape)
        try:
            scales, errors = self.workspace.quantizer.quantize(weights, codes)
        except NotFiniteError as error:
            raise self._not_finite(stretches, error, float(weights[error.row, error.column])) from None
        return codes, scales, errors

    def _stretches(self, first: int) -> list[tuple[int, int, int]]:
        """(piece, first row of its tensor, rows) of all that a strip from row `first` of the matrix on holds."""
        found, above, last = [], 0, first + self.block[0]
        for number in range(len(self.pieces)):
            top, bottom = self._rows(number)
            begin, end = max(first - above, 0), min(last - above, bottom - top)
            if begin < end:
                found.append((number, top + begin, end - begin))
            above += bottom - top
        return found

    def _rows(self, number: int) -> tuple[int, int]:
        return self.pieces[number].rows or (0, self.infos[number].shape[0])

    def _columns(self, number: int) -> tuple[int, int]:
        return self.pieces[number].columns or (0, self.infos[number].shape[1])

    def _read(self, number: int, top: int, rows: int) -> Array:
        info, (left, right) = self.infos[number], self._columns(number)
        row = info.shape[1] * info.dtype.itemsize
        data = self.workspace.bytes(0, rows * row)
        self.files.read(info.path, data.data, info.offset + top * row)
        return data.view(info.dtype.numpy).reshape(rows, -1)[:, left:right]

    def _not_finite(
        self, stretches: Sequence[tuple[int, int, int]], error: NotFiniteError, value: float
    ) -> AngelForgeError:
        number, row = [(number, top + row) for number, top, rows in stretches for row in range(rows)][error.row]
        info, column = self.infos[number], self._columns(number)[0] + error.column
        return AngelForgeError(
            f"{info.name} at [{row}, {column}] is {value}, which cannot be quantised to FP8. "
            f"The checkpoint is damaged: fetch {info.path} again."
        )
