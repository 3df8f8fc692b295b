"""Launch rules of the experts' matmuls: persistent programs that share the work of all experts."""

from collections.abc import Mapping
from typing import Any

from angelforge.plugins.kernel import Gpu, Tile


def expert_constants(dims: Mapping[str, Any], tile: Tile, channels: int, depth: int) -> dict[str, Any]:
    """The constants of a kernel that multiplies by weights [E, channels, depth]."""
    few = tile.m < 64
    return {
        "experts": dims["E"],
        "per_token": dims["k"],
        "channels": channels,
        "depth": depth,
        "m": tile.m,
        "n": tile.n,
        "k": tile.k,
        "at_once": 4 if few else 16,  # words of expert_tokens in one step: 128 tokens or 512
        "fill": 64 if few else 256,  # entries that are looked through for padding in one step
    }


def expert_grid(dims: Mapping[str, Any], gpu: Gpu, tile: Tile) -> tuple[Any, int, int]:
    """As many programs as the GPU holds at a time."""
    return gpu.sms * tile.blocks_per_sm, 1, 1
