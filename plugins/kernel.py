"""The convention between an operator's Triton kernel and whoever launches it: a test, a benchmark, or TensorRT.

A kernel's parameters are, in this order: one pointer per input, the `extras` as int32, one pointer per output (an
aliased output has its input's address), then constants. TensorRT's ahead-of-time plugins pass arguments in the same
order. A grid depends on shapes and the GPU only. Pointers are aligned to 16 bytes; extras are named in the function's
`do_not_specialize`, so that a kernel compiled at a call is the kernel compiled ahead of time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from angelforge.plugins.architectures import SMALL_BLOCKS, shared_limit
from angelforge.plugins.operator import Operator


@dataclass(frozen=True)
class Gpu:
    """What a launch rule may know of the device."""

    architecture: str  # "sm_90"
    sms: int  # streaming multiprocessors


@dataclass(frozen=True)
class Tile:
    """What may be tuned about one kernel: sizes of a block's tile, warps and pipeline stages.

    `m` counts tokens (or query rows), `n` output channels (or keys), `k` the contraction.
    """

    m: int
    n: int
    k: int = 128
    warps: int = 4
    stages: int = 3
    blocks_per_sm: int = 1


@dataclass(frozen=True)
class Kernel:
    """A Triton function and how it is launched for given shapes.

    `dims` in the rules are `Binding.dims`: the operator's symbols with attributes beside them; `types` are
    `Binding.types`: every port's element type by the port's name.
    Sizes that weights or attributes fix are integers; those that a step decides (T, N, B, P, pages, …) are named in
    `extras`, may be symbolic expressions in `grid`, and must not appear in `constants`.
    """

    operator: Operator
    function: Any  # triton.JITFunction
    extras: tuple[str, ...]  # symbols handed over as int32, in this order
    constants: Callable[[Mapping[str, Any], Mapping[str, ir.DataType], Tile], dict[str, Any]]
    grid: Callable[[Mapping[str, Any], Gpu, Tile], tuple[Any, Any, Any]]
    tile: Callable[[Mapping[str, Any], int], Tile]  # (dims, most tokens of the profile) → default tile
    small_tile: Callable[[Mapping[str, Any], int], Tile] | None = None  # the same where a block has 99 KB, if another

    def tile_on(self, gpu: Gpu, dims: Mapping[str, Any], most_tokens: int) -> Tile:
        """The default tile on a GPU in a profile of at most `most_tokens` tokens."""
        if self.small_tile is not None and shared_limit(gpu.architecture) <= SMALL_BLOCKS:
            return self.small_tile(dims, most_tokens)
        return self.tile(dims, most_tokens)
