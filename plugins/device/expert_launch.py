"""Launch rules of the experts' matmuls: persistent programs that share the work of all experts."""

from collections.abc import Mapping, Sequence
from typing import Any

from angelforge.plugins.kernel import Gpu, Tile

MOST_EXPERTS = 1024  # a block keeps the ends of all experts' tiles in registers
MOST_PER_TOKEN = 32  # shared experts included; all of a token's experts stand in registers where one of them is sought


def expert_constants(dims: Mapping[str, Any], tile: Tile, channels: int, depth: int, span: int = 1) -> dict[str, Any]:
    """The constants of a kernel that multiplies by weights [E, channels, depth].

    With many rows a piece of work is `span` columns of tiles: finding out whose rows a tile has takes about 2 µs.

    Raises:
        ValueError: a side of the tile is too short for the tensor core, or there are too many experts, of all or of a
            token.
    """
    check_experts(dims["E"], dims["k"])
    few = tile.m < 64
    if tile.m < 16 or tile.n < (64 if few else 16) or tile.k < 32:
        raise ValueError(f"no tensor-core instruction for a tile of {tile.m} tokens × {tile.n} channels × {tile.k}")
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


def check_experts(experts: int, per_token: int) -> None:
    """Refuses more experts than the kernels' registers hold, of all and of a token, shared ones included.

    Raises:
        ValueError: saying which, and the limit.
    """
    for found, most, what in ((experts, MOST_EXPERTS, "experts"), (per_token, MOST_PER_TOKEN, "experts a token")):
        if found > most:
            raise ValueError(f"the kernels take at most {most} {what}, shared ones included, got {found}")


def require_fp8_tile(tile: Tile, narrow: Sequence[int], wide: int) -> None:
    """Refuses tiles that the FP8 kernels have no code for.

    Raises:
        ValueError: n is not one of `narrow` for fewer than 64 tokens, or not `wide` with whole blocks of 128 for more.
    """
    fits = tile.n in narrow and 128 % tile.k == 0 if tile.m < 64 else tile.n == wide and tile.k == 128
    if not fits:
        raise ValueError(
            f"FP8 experts take tiles of {' or '.join(map(str, narrow))} channels for fewer than 64 tokens and of "
            f"{wide} × 128 for more, not {tile}"
        )


def expert_grid(dims: Mapping[str, Any], gpu: Gpu, tile: Tile) -> tuple[Any, int, int]:
    """As many programs as the GPU holds at a time."""
    return gpu.sms * tile.blocks_per_sm, 1, 1
