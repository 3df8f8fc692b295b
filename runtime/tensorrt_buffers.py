"""What an engine's steps need of device memory beside weights and activations: pools, outputs, states for a draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from angelforge.dtypes import DType
from angelforge.engines.profiles import Profile
from angelforge.runtime.device import ALIGNMENT, Device
from angelforge.runtime.packing import Padding
from angelforge.runtime.tensorrt_bindings import Bindings, Tensor, pool_bytes
from angelforge.runtime.tensorrt_inputs import InputLayout

_TORCH = {DType.F32: torch.float32, DType.BF16: torch.bfloat16, DType.F16: torch.float16, DType.I64: torch.int64}


@dataclass(frozen=True, eq=False)
class Buffer:
    """Memory of the device seen as a tensor."""

    tensor: Any  # torch.Tensor

    @property
    def address(self) -> int:
        """Where it begins."""
        return int(self.tensor.data_ptr())

    @classmethod
    def of(cls, device: Device, dtype: DType, shape: Sequence[int]) -> Buffer:
        """Zeros. Raises AngelForgeError without memory."""
        raw = device.allocate(buffer_bytes(dtype, shape))
        return cls(raw.zero_().view(_TORCH[dtype]).view(*shape))


def buffer_bytes(dtype: DType, shape: Sequence[int]) -> int:
    """Bytes of such a tensor."""
    size = dtype.itemsize
    for dim in shape:
        size *= dim
    return size


def allocate_pools(device: Device, pools: Sequence[Tensor], pages: int) -> Any:
    """Zeros for all layers: what lies behind a sequence's end is masked, which turns numbers into 0, but not NaN."""
    return device.allocate(sum(pool_bytes(pool, pages) for pool in pools)).zero_()


def pool_view(memory: Any, pools: Sequence[Tensor], layer: int, pages: int) -> Any:
    """A layer's pool as a tensor [pages, 2, kv_heads, page_size, head_dim]."""
    begin = sum(pool_bytes(pool, pages) for pool in pools[:layer])
    shape = (pages, *pools[layer].shape[1:])
    nbytes = buffer_bytes(pools[layer].dtype, shape)
    return memory[begin : begin + nbytes].view(_TORCH[pools[layer].dtype]).view(*shape)


def largest_of(profiles: Sequence[Profile]) -> Padding:
    """The sizes that no step of an engine exceeds."""
    last = profiles[-1]
    return Padding(last.tokens.most, last.batch.most, last.pages_per_sequence.most, last.logit_rows.most)


@dataclass(frozen=True)
class StatePlan:
    """One tensor for the states that a draft goes on from: those of the target's tokens, then those of its own rows.

    A step of the draft picks its states from it by row, whichever of the two it follows, so that one captured graph
    serves both.
    """

    tensor: Tensor  # the target's output draft_hidden [T, hidden]
    tokens: int  # rows of the target, rounded up so that the draft's begin aligned
    rows: int  # of the draft

    @classmethod
    def of(cls, bindings: Bindings, largest: Padding) -> StatePlan | None:
        """None for an engine without a draft."""
        tensor = bindings.outputs.get("draft_hidden")
        if tensor is None:
            return None
        step = ALIGNMENT  # rows of one byte would need as many; any width divides evenly then
        return cls(tensor, -(-largest.tokens // step) * step, largest.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """[states, hidden]."""
        return self.tokens + self.rows, self.tensor.shape[-1]


def step_bytes(bindings: Bindings, largest: Padding, states: StatePlan | None) -> int:
    """Inputs, logits and states of an engine's steps."""
    logits = bindings.outputs["logits"]
    total = InputLayout(largest).nbytes + buffer_bytes(logits.dtype, (largest.rows, logits.shape[-1]))
    return total + (0 if states is None else buffer_bytes(states.tensor.dtype, states.shape))
