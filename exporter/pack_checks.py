"""What can be known to go wrong before the first byte is packed: unfit sources, too little space."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from angelforge.checkpoint import Checkpoint
from angelforge.config import Quantization
from angelforge.diskerrors import explained
from angelforge.dtypes import DType
from angelforge.errors import AngelForgeError
from angelforge.exporter.conversion import convertible, quantizable
from angelforge.exporter.layout import SCALE, Shard
from angelforge.exporter.pieces import DRAFT, Piece, Quantized

_RESERVE = 16 << 20  # bytes left for graph, manifest and journal


def check_sources(checkpoint: Checkpoint, shards: Sequence[Shard]) -> None:
    """Raises AngelForgeError for the first tensor that is absent, misshapen or of a type that cannot be converted."""
    for shard in shards:
        for tensor in shard.tensors:
            for piece in tensor.pieces:
                if isinstance(tensor.source, Quantized):
                    _check_quantized(checkpoint, piece)
                else:
                    _check_piece(checkpoint, piece, tensor.dtype)


def _check_quantized(checkpoint: Checkpoint, piece: Piece) -> None:
    dtype = _require(checkpoint, piece.tensor, piece.shape)
    if not quantizable(dtype):
        raise AngelForgeError(
            f"{piece.tensor} in {checkpoint.folder} is {dtype.value}; only F32, F16 and BF16 can be quantised to FP8. "
            "Choose another --precision."
        )


def _check_piece(checkpoint: Checkpoint, piece: Piece, target: DType) -> None:
    dtype = _require(checkpoint, piece.tensor, piece.shape)
    if not convertible(dtype, target):
        raise AngelForgeError(
            f"{piece.tensor} in {checkpoint.folder} is {dtype.value}, which cannot be written as {target.value}. "
            "Choose another --precision."
        )
    if dtype is DType.F8_E4M3 and target is not dtype:
        # A draft's own config.json has been compared with its tensors.
        if checkpoint.config.quantization is None and not piece.tensor.startswith(DRAFT):
            raise AngelForgeError(
                f"{piece.tensor} is FP8, but the config.json of {checkpoint.folder} has no quantization_config. "
                "Fetch the config.json that belongs to the weights."
            )
        blocks = tuple(-(-size // step) for size, step in zip(piece.shape, Quantization().block, strict=True))
        _require(checkpoint, piece.tensor + SCALE, blocks)


def _require(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> DType:
    info = checkpoint.tensors.get(name)
    if info is None or info.shape != shape:
        found = "is missing" if info is None else f"has the shape {list(info.shape)}"
        raise AngelForgeError(
            f"{name} {found} in {checkpoint.folder}, but the shape {list(shape)} is needed. "
            "Fetch the checkpoint again, or the config.json that belongs to it."
        )
    return info.dtype


def check_space(missing: Sequence[Shard], bundle_dir: Path, workers: int) -> None:
    """Raises AngelForgeError when the files still to be written do not fit on the disk.

    An older file is freed only when the new one is complete, so room for the files in flight is needed too.
    """
    if not missing:
        return
    older = [_size(bundle_dir / shard.file) for shard in missing]
    growth = sum(shard.size for shard in missing) - sum(older)
    in_flight = sum(sorted(older, reverse=True)[:workers])
    needed = max(growth, 0) + in_flight + _RESERVE
    with explained("look at", bundle_dir):
        free = shutil.disk_usage(bundle_dir).free
    if free < needed:
        raise AngelForgeError(
            f"Packing the weights needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free in {bundle_dir}. "
            "Free some space or choose a folder on another disk."
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
