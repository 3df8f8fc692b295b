"""The kernels of this folder as they are compiled and launched: functions, constants, warps and types of parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from angelforge.plugins.sampling import groups, penalties
from angelforge.plugins.sampling.choice import choose_tokens
from angelforge.plugins.sampling.likeliest import measure_rows
from angelforge.plugins.sampling.rows import CANDIDATES as _CANDIDATES
from angelforge.plugins.sampling.rows import GROUP as _GROUP

GROUP: int = _GROUP.value  # ids of a group
CANDIDATES: int = _CANDIDATES.value  # of a row that are listed at most
GROUPS_A_PROGRAM = groups.TILE
ENTRIES_A_PROGRAM = penalties.TILE

# Of every parameter that is no constant, by its name, in Triton's words.
TYPES: dict[str, str] = {
    **dict.fromkeys(("logits", "sums", "values", "peaks", "own", "top_values", "penalties", "ahead_counts"), "*fp32"),
    **dict.fromkeys(("rules", "uniform", "totals"), "*fp64"),
    **dict.fromkeys(("rows", "tokens", "begins", "sizes", "chosen"), "*i64"),
    **dict.fromkeys(("mask_of", "masks", "keys", "groups_listed", "ids", "top_ids", "ahead_ids", "table"), "*i32"),
    "count": "i32",
    "ahead": "i32",
}


@dataclass(frozen=True)
class SamplingKernel:
    """A Triton function for rows of one vocabulary. Pointers are aligned to 16 bytes; None stands for `left_out`."""

    function: Any  # triton.JITFunction
    constants: Mapping[str, Any]  # the function's last parameters, in its order
    warps: int
    left_out: tuple[str, ...] = ()  # parameters that it does not read


def group_rows(vocab: int, words: int, tempered: bool) -> SamplingKernel:
    """`words` of 32 ids has a mask, 0 for no masks; without `tempered` the logits count as they are."""
    constants = {"vocab": vocab, "words": words, "tempered": tempered, "tile": groups.TILE}
    left_out = () if tempered else ("rules",)
    return SamplingKernel(groups.group_rows, constants, 4, left_out + _without_masks(words))


def choose(vocab: int, words: int) -> SamplingKernel:
    """The token of each row."""
    width = padded_groups(vocab)
    constants = {"vocab": vocab, "words": words, "width": width}
    return SamplingKernel(choose_tokens, constants, _warps(width), _without_masks(words))


def measure(vocab: int) -> SamplingKernel:
    """What logprobs need."""
    width = padded_groups(vocab)
    return SamplingKernel(measure_rows, {"vocab": vocab, "width": width}, _warps(width))


def penalize(vocab: int, columns: int) -> SamplingKernel:
    """With at most so many proposals a row, of `columns_for`."""
    constants = {"vocab": vocab, "columns": columns, "tile": penalties.TILE}
    return SamplingKernel(penalties.penalize_rows, constants, 4, () if columns else ("ahead_ids", "ahead_counts"))


def columns_for(ahead: int) -> int:
    """What `ahead` proposals a row are padded to, so that few kernels serve all."""
    return max(8, 1 << (ahead - 1).bit_length()) if ahead else 0


def group_count(vocab: int) -> int:
    """Of a row."""
    return -(-vocab // GROUP)


def padded_groups(vocab: int) -> int:
    """The same as a power of two."""
    return max(GROUP, 1 << (group_count(vocab) - 1).bit_length())


def _warps(width: int) -> int:
    return min(16, max(4, width // 512))


def _without_masks(words: int) -> tuple[str, ...]:
    return () if words else ("mask_of", "masks")
