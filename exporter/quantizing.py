"""Weights quantised while they are packed: e4m3 codes and scales as runs of a weight file.

One row of blocks of a tensor is read and quantised at a time, so that memory depends on the width of a tensor and not
on its size. Only the scales of a file are kept until they are written: 4 bytes for 16,384 weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from angelforge.checkpoint import Checkpoint
from angelforge.errors import AngelForgeError
from angelforge.exporter.block_fp8 import BlockQuantizer, NotFiniteError
from angelforge.exporter.openfiles import OpenFiles
from angelforge.exporter.pieces import Piece, Quantized
from angelforge.exporter.quantization_errors import Errors
from angelforge.tensorfile import TensorInfo

Array = npt.NDArray[Any]


class FileQuantizer:
    """Quantises the tensors of one weight file, in one thread. `errors` holds what was lost, by kind of tensor."""

    def __init__(self, checkpoint: Checkpoint, files: OpenFiles) -> None:
        self.errors: dict[str, Errors] = {}
        self._checkpoint = checkpoint
        self._files = files
        self._scales: dict[Piece, Array] = {}
        self._workspaces: dict[tuple[int, int], _Workspace] = {}

    def runs(self, source: Quantized) -> Iterator[CodesRun | ScalesRun]:
        """The codes, or the scales, of every piece of `source`; each run is made when it is asked for."""
        for piece in source.pieces:
            if source.block not in self._workspaces:
                self._workspaces[source.block] = _Workspace(source.block)
            info = self._checkpoint.tensors[piece.tensor]
            strips = _Strips(piece, info, source.block, self._files, self._workspaces[source.block])
            yield CodesRun(strips, self) if source.part == "codes" else ScalesRun(strips, self)

    def finish(self, piece: Piece, scales: Array, errors: Errors) -> None:
        """Takes in a piece whose codes have all been made; its scales are f32 [row blocks, column blocks]."""
        kind = kind_of(piece.tensor)
        self._scales[piece] = scales
        self.errors[kind] = self.errors.get(kind, Errors()) + errors.of_tensor(piece.tensor)

    def scales(self, strips: _Strips) -> Array:
        """The scales of a piece. Where they stand in front of its codes, its weights are read twice."""
        piece = strips.piece
        if piece not in self._scales:
            self._scales[piece] = np.stack([strips.quantize(index)[1] for index in range(strips.count)])
        return self._scales[piece]


def kind_of(tensor: str) -> str:
    """What a quantised tensor of a checkpoint belongs to, as reports name it."""
    kinds = {".attention.": "attention", ".experts.": "routed experts", ".shared_experts.": "shared experts"}
    return next((kind for part, kind in kinds.items() if part in tensor), "dense MLP")


class CodesRun:
    """The e4m3 codes of one piece, to be asked for front to back."""

    def __init__(self, strips: _Strips, owner: FileQuantizer) -> None:
        self._strips, self._owner = strips, owner
        self._codes = np.empty(0, np.uint8)  # of the last strip
        self._scales: list[Array] = []  # of all strips so far
        self._errors = Errors()
        self.nbytes = strips.piece.size

    def fill(self, view: memoryview, offset: int) -> None:
        """Writes the codes from `offset` on into all of `view`."""
        strips, done = self._strips, 0
        while done < len(view):
            index, skip = divmod(offset + done, strips.block[0] * strips.width)
            if index == len(self._scales):
                self._make(index)
            codes = self._codes[skip : skip + len(view) - done]
            view[done : done + len(codes)] = codes.data
            done += len(codes)

    def _make(self, index: int) -> None:
        codes, scales, errors = self._strips.quantize(index)
        self._codes = codes.reshape(-1)
        self._scales.append(scales)
        self._errors += errors
        if len(self._scales) == self._strips.count:
            self._owner.finish(self._strips.piece, np.stack(self._scales), self._errors)


class ScalesRun:
    """The f32 scales of one piece."""

    def __init__(self, strips: _Strips, owner: FileQuantizer) -> None:
        self._strips, self._owner = strips, owner
        self.nbytes = strips.count * -(-strips.width // strips.block[1]) * 4

    def fill(self, view: memoryview, offset: int) -> None:
        """Writes the bytes from `offset` on into all of `view`."""
        data = self._owner.scales(self._strips).view(np.uint8).reshape(-1)
        view[:] = data[offset : offset + len(view)].data


class _Workspace:
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
class _Strips:
    """A piece cut into rows of blocks, counted from its own upper left corner."""

    piece: Piece
    info: TensorInfo
    block: tuple[int, int]
    files: OpenFiles
    workspace: _Workspace

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
