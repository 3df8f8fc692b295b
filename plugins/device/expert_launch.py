"""Launch rules of the experts' matmuls: persistent programs that share the work of all experts."""

from collections.abc import Mapping
from typing import Any

from angelforge.plugins.kernel import Gpu, Tile


def expert_constants(dims: Mapping[str, Any], tile: Tile, channels: int, depth: int, span: int = 1) -> dict[str, Any]:
    """The constants of a kernel that multiplies by weights [E, channels, depth].

    With many rows a piece of work is `span` columns of tiles: finding out whose rows a tile has takes about 2 µs.
    """
    few = tile.m < 64
    return {
        "experts": dims["E"],
        "per_token": dims["k"],
        "channels": channels,
        "depth": depth,
        "m": tile.m,
        "n": tile.n,
        "k": tile.k,
        "span": 1 if few else span,
        "count": 4 if few else 16,  # words of every expert, 32 tokens each, that are counted in one step
        "reach": 4 if few else 16 * tile.warps,  # words of one expert in which a tile's rows are looked for in one step
        "fill": 64 if few else 128,  # entries that are looked through for padding in one step
    }


def expert_grid(dims: Mapping[str, Any], gpu: Gpu, tile: Tile) -> tuple[Any, int, int]:
    """As many programs as the GPU holds at a time."""
    return gpu.sms * tile.blocks_per_sm, 1, 1
