"""A tensor read and quantised one row of blocks at a time: memory depends on its width, not on its size."""

from __future__ import annotations

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
    """A piece cut into rows of blocks, counted from its own upper left corner."""

    piece: Piece
    info: TensorInfo
    block: tuple[int, int]
    files: OpenFiles
    workspace: Workspace

    @property
    def width(self) -> int:
        """Columns of the piece."""
        left, right = self._columns
        return right - left

    @property
    def count(self) -> int:
        """Strips of the piece; the last one may be lower than a block."""
        top, bottom = self._rows
        return -(-(bottom - top) // self.block[0])

    def quantize(self, index: int) -> tuple[Array, Array, Errors]:
        """Codes uint8 [rows, width] (valid until the next call), scales f32 [column blocks] and errors of a strip.

        Raises AngelForgeError naming tensor and position for NaN and infinity.
        """
        (begin, end), (left, right) = self._rows, self._columns
        top = begin + index * self.block[0]
        rows = min(self.block[0], end - top)
        weights = self._read(top, rows)[:, left:right]
        codes = self.workspace.bytes(1, rows * self.width).reshape(rows, self.width)
        try:
            scales, errors = self.workspace.quantizer.quantize(weights, codes)
        except NotFiniteError as error:
            value = float(weights[error.row, error.column])
            raise AngelForgeError(
                f"{self.info.name} at [{top + error.row}, {left + error.column}] is {value}, which cannot be quantised "
                f"to FP8. The checkpoint is damaged: fetch {self.info.path} again."
            ) from None
        return codes, scales, errors

    @property
    def _rows(self) -> tuple[int, int]:
        return self.piece.rows or (0, self.info.shape[0])

    @property
    def _columns(self) -> tuple[int, int]:
        return self.piece.columns or (0, self.info.shape[1])

    def _read(self, top: int, rows: int) -> Array:
        row = self.info.shape[1] * self.info.dtype.itemsize
        data = self.workspace.bytes(0, rows * row)
        self.files.read(self.info.path, data.data, self.info.offset + top * row)
        return data.view(self.info.dtype.numpy).reshape(rows, -1)
