"""The bytes of a weight file as a stream: runs of source bytes as they are, or rows converted block by block.

A run can fill any part of a buffer, so that the packer's memory depends on its buffers alone. Nothing is mapped: mapped
pages would count as memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from angelforge.checkpoint import Checkpoint
from angelforge.config import Quantization
from angelforge.dtypes import DType
from angelforge.errors import AngelForgeError
from angelforge.exporter.conversion import convert, dequantize, first_overflow
from angelforge.exporter.damage import refuse_damage
from angelforge.exporter.layout import SCALE, Shard
from angelforge.exporter.openfiles import OpenFiles
from angelforge.exporter.pieces import Piece, Quantized, RopeTable
from angelforge.exporter.quantizing import FileQuantizer
from angelforge.rope import rope_tables
from angelforge.tensorfile import TensorInfo

Array = npt.NDArray[Any]

_BLOCK = 1 << 19  # elements converted at a time: intermediate arrays of a few MB


class Run(Protocol):
    """A stretch of a weight file."""

    @property
    def nbytes(self) -> int:
        """Its length."""
        ...

    def fill(self, view: memoryview, offset: int) -> None:
        """Writes its bytes from `offset` on into all of `view`; both are whole elements."""
        ...


def shard_runs(shard: Shard, checkpoint: Checkpoint, files: OpenFiles, quantizer: FileQuantizer) -> Iterator[Run]:
    """The runs of a whole file in order; each is made when it is asked for. `quantizer` is that of this file alone."""
    yield _Bytes(memoryview(shard.header))
    tables = cache(rope_tables)  # cos and sin come together; forgotten at the end of the file
    for tensor in shard.tensors:
        if isinstance(tensor.source, RopeTable):
            cos, sin = tables(tensor.source.config, tensor.shape[0])
            table = np.ascontiguousarray(cos if tensor.source.function == "cos" else sin)
            yield _Bytes(memoryview(table.view(np.uint8).reshape(-1).data))
        elif isinstance(tensor.source, Quantized):
            yield from quantizer.runs(tensor.source)
        else:
            for piece in tensor.pieces:
                yield _piece_run(piece, tensor.dtype, checkpoint, files)


def _piece_run(piece: Piece, target: DType, checkpoint: Checkpoint, files: OpenFiles) -> Run:
    info = checkpoint.tensors[piece.tensor]
    codes = checkpoint.tensors[piece.tensor.removesuffix(SCALE)] if piece.tensor.endswith(SCALE) else None
    if info.dtype is target and piece.columns is None:
        row_bytes = info.shape[-1] * info.dtype.itemsize
        skipped = 0 if piece.rows is None else piece.rows[0] * row_bytes
        return _Copy(info, files, skipped, piece.size * info.dtype.itemsize, codes)
    if info.dtype is DType.F8_E4M3 and target is not DType.F8_E4M3:
        # Beside it are its scales: see pack_checks.
        return _Rows(piece, info, target, files, checkpoint.tensors[piece.tensor + SCALE], Quantization().block)
    return _Rows(piece, info, target, files, codes=codes)


@dataclass(frozen=True)
class _Bytes:
    """Bytes that are in memory already."""

    data: memoryview

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def fill(self, view: memoryview, offset: int) -> None:
        view[:] = self.data[offset : offset + len(view)]


@dataclass(frozen=True)
class _Copy:
    """Bytes of a source tensor as they are, after its first `skipped`; of scales `codes` are the weights."""

    info: TensorInfo
    files: OpenFiles
    skipped: int
    nbytes: int
    codes: TensorInfo | None = None

    def fill(self, view: memoryview, offset: int) -> None:
        start = self.skipped + offset
        self.files.read(self.info.path, view, self.info.offset + start)
        refuse_damage(self.info, np.frombuffer(view, np.uint8), start, self.files, self.codes)


@dataclass(frozen=True)
class _Rows:
    """A rectangle of a source tensor, read row by row and converted to `target`."""

    piece: Piece
    info: TensorInfo
    target: DType
    files: OpenFiles
    scale_info: TensorInfo | None = None
    block: tuple[int, int] = (128, 128)
    codes: TensorInfo | None = None  # where the tensor is the scales of FP8 weights: those

    @property
    def nbytes(self) -> int:
        return self.piece.size * self.target.itemsize

    def fill(self, view: memoryview, offset: int) -> None:
        left, right = self._columns
        width, item = right - left, self.target.itemsize
        if width == 0:
            return
        begin, end = offset // item, (offset + len(view)) // item  # elements of the rectangle
        out = np.frombuffer(view, np.uint8)
        step = max(1, _BLOCK // self.info.shape[-1])
        for first in range(begin // width, -(-end // width), step):
            last = min(first + step, -(-end // width))
            rows = self._convert(first, last).view(np.uint8).reshape(-1)
            skip, stop = max(begin - first * width, 0), min(end, last * width) - first * width
            place = (first * width + skip - begin) * item
            out[place : place + (stop - skip) * item] = rows[skip * item : stop * item]

    @property
    def _columns(self) -> tuple[int, int]:
        return self.piece.columns or (0, self.info.shape[-1])

    def _convert(self, first: int, last: int) -> Array:
        """Rows `first` to `last` of the rectangle, contiguous, in the target type."""
        top = 0 if self.piece.rows is None else self.piece.rows[0]
        left, right = self._columns
        values = self._read(top + first, top + last)[:, left:right]  # [rows, columns]
        if self.info.dtype is self.target:
            return np.ascontiguousarray(values)
        if self.scale_info is None:
            result = convert(values, self.target)
        else:
            result = self._dequantize(values.view(np.uint8), top + first, left)
        self._refuse_overflow(values, result, top + first)
        return result

    def _read(self, first: int, last: int) -> Array:
        width = self.info.shape[-1]
        rows = np.empty((last - first, width), self.info.dtype.numpy)
        data, start = rows.view(np.uint8).reshape(-1), first * width * self.info.dtype.itemsize
        self.files.read(self.info.path, data.data, self.info.offset + start)
        refuse_damage(self.info, data, start, self.files, self.codes)
        return rows

    def _dequantize(self, codes: Array, top: int, left: int) -> Array:
        """The weights of a rectangle of the source whose first element is (top, left)."""
        rows, columns = codes.shape
        block_rows = np.arange(top, top + rows) // self.block[0]
        block_columns = np.arange(left, left + columns) // self.block[1]
        scales = self._scales[block_rows[0] : block_rows[-1] + 1]
        return dequantize(codes, scales, block_rows - block_rows[0], block_columns, self.target)

    @cached_property
    def _scales(self) -> Array:
        info = self.scale_info
        assert info is not None
        scales = np.empty(info.shape, np.float32)
        data = scales.view(np.uint8).reshape(-1)
        self.files.read(info.path, data.data, info.offset)
        refuse_damage(info, data, 0, self.files, self.info)
        return scales

    def _refuse_overflow(self, before: Array, after: Array, first_row: int) -> None:
        position = first_overflow(before, after)
        if position is None:
            return
        row, column = divmod(position, after.shape[1])
        left = self._columns[0]
        place = [column + left] if len(self.info.shape) == 1 else [row + first_row, column + left]
        value = f"{before[row, column].astype(np.float64):g}{'' if self.scale_info is None else ' times its scale'}"
        raise AngelForgeError(
            f"{self.info.name} at {place} is {value}, which does not fit {self.target.value}. "
            "Export with --precision fp32, or repair the checkpoint."
        )
