"""What a tensor of a bundle is made of: rectangles of checkpoint tensors, a rope table, or another tensor's bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from angelforge.config import ModelConfig
from angelforge.draft_config import DraftConfig
from angelforge.dtypes import DType

DRAFT = "draft."  # before every name of a draft's checkpoint, in the bundle and as the source of its tensors

Shape = tuple[int, ...]
Range = tuple[int, int]  # begin, end


@dataclass(frozen=True)
class Piece:
    """A rectangle of the checkpoint tensor `tensor`, which has the shape `shape` ([N] counts as one row of N)."""

    tensor: str
    shape: Shape
    rows: Range | None = None  # None: all
    columns: Range | None = None  # None: all

    @property
    def size(self) -> int:
        """Elements."""
        total_rows, total_columns = (1, *self.shape)[-2:]
        begin, end = self.rows or (0, total_rows)
        left, right = self.columns or (0, total_columns)
        return (end - begin) * (right - left)


@dataclass(frozen=True)
class RopeTable:
    """The cos or sin table of `angelforge.rope.rope_tables`, as many positions as the tensor has rows."""

    config: ModelConfig | DraftConfig
    function: Literal["cos", "sin"]


@dataclass(frozen=True)
class Quantized:
    """FP8 made of `pieces`, each in blocks counted from its own upper left corner: e4m3 codes, or f32 block scales.

    `joined` pieces, of equal width, are one matrix from top to bottom: blocks are counted from its corner.
    """

    pieces: tuple[Piece, ...]
    part: Literal["codes", "scales"]
    block: tuple[int, int]
    joined: bool = False

    @property
    def matrices(self) -> tuple[tuple[Piece, ...], ...]:
        """The pieces of each matrix that is cut into blocks as a whole."""
        return (self.pieces,) if self.joined else tuple((piece,) for piece in self.pieces)


@dataclass(frozen=True)
class SameBytes:
    """The tensor is `tensor` of the bundle under a second name and is stored once."""

    tensor: str


@dataclass(frozen=True)
class BundleTensor:
    """One tensor of a bundle's weight files. Pieces follow one another without gaps."""

    name: str
    dtype: DType
    shape: Shape
    source: tuple[Piece, ...] | Quantized | RopeTable | SameBytes

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What of the checkpoint is read for it."""
        if isinstance(self.source, Quantized):
            return self.source.pieces
        return self.source if isinstance(self.source, tuple) else ()
