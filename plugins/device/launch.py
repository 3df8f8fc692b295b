"""Launch rules that kernels share."""

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from angelforge.plugins.kernel import Gpu, Tile

MOST_CHANNELS = 32768  # of a row that one block keeps in its registers


def ceil_div(size: Any, divisor: int) -> Any:
    """⌈size / divisor⌉ of an integer or a symbolic expression."""
    return (size + (divisor - 1)) // divisor


def tile_grid(tokens: Any, channels: int, tile: Tile) -> tuple[Any, int, int]:
    """One program for each tile of a [tokens, channels] output, as `device.tokens.tile_of` numbers them."""
    return ceil_div(tokens, tile.m) * ceil_div(channels, tile.n), 1, 1


def row_grid(dims: Mapping[str, Any], gpu: Gpu, tile: Tile) -> tuple[Any, int, int]:
    """One program for each token."""
    return dims["T"], 1, 1


def norm_constants(dims: Mapping[str, Any], types: Mapping[str, ir.DataType], tile: Tile) -> dict[str, Any]:
    """The constants of kernels that normalise rows of H channels, as `device.norm` names them.

    Raises:
        ValueError: the row does not fit in the tile, or the tile not in a block's registers.
    """
    if tile.n % 128 != 0 or not dims["H"] <= tile.n <= MOST_CHANNELS:
        raise ValueError(f"a row of {dims['H']} channels needs a tile of that many, and of at most {MOST_CHANNELS}")
    return {"width": dims["H"], "groups": tile.n // 128, "epsilon": dims["epsilon"]}


def norm_tile(dims: Mapping[str, Any], tokens: int) -> Tile:
    """A whole row a block, 16 channels a thread."""
    row = max(128, 1 << (dims["H"] - 1).bit_length())
    return Tile(m=1, n=row, warps=min(16, max(1, row // 512)), stages=1)


def matmul_constants(channels: int, depth: int, tile: Tile) -> dict[str, Any]:
    """The constants of dense matmuls, as `device.matmul` and `device.fp8` name them.

    Raises:
        ValueError: a side of the tile is too short for the tensor core.
    """
    if tile.m < 16 or tile.n < (64 if tile.m < 64 else 16) or tile.k < 32:
        raise ValueError(f"no tensor-core instruction for a tile of {tile.m} tokens × {tile.n} channels × {tile.k}")
    return {"channels": channels, "depth": depth, "m": tile.m, "n": tile.n, "k": tile.k}


def require_whole_blocks(tile: Tile, channels: Sequence[int] = (16, 32, 64, 128)) -> None:
    """Refuses tiles that a quantisation block of 128 × 128 is not a multiple of.

    Raises:
        ValueError: the tile has another number of channels than these, or 128 is no multiple of its k.
    """
    if tile.n not in channels or 128 % tile.k != 0:
        raise ValueError(
            f"FP8 tiles have {' or '.join(map(str, channels))} channels and divide 128 along K, not {tile}"
        )


def require_bf16(name: str, types: Mapping[str, ir.DataType], *ports: str) -> None:
    """Refuses types that have no tensor-core kernel.

    Raises:
        ValueError: a port is not bf16.
    """
    for port in ports:
        if types[port] != ir.DataType.BFLOAT16:
            raise ValueError(
                f"{name}'s kernel reads bf16, {port} is {types[port].name}; f32 bundles run on the CPU target"
            )
