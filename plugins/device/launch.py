"""Launch rules that kernels share."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from angelforge.plugins.kernel import Gpu, Tile


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
    """The constants of kernels that normalise rows of H channels, as `device.norm` names them."""
    return {"width": dims["H"], "groups": tile.n // 128, "epsilon": dims["epsilon"]}


def norm_tile(dims: Mapping[str, Any], tokens: int) -> Tile:
    """A whole row a block, 16 channels a thread."""
    row = max(128, 1 << (dims["H"] - 1).bit_length())
    return Tile(m=1, n=row, warps=min(16, max(1, row // 512)), stages=1)


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
