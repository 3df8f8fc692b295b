"""What the memory planner is asked, and what it answers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from angelforge.config import ModelConfig
from angelforge.engines.decode_limit import DecodeLimit
from angelforge.engines.footprint import WeightBytes
from angelforge.errors import UsageError
from angelforge.precision import Precision
from angelforge.rope import too_long_remedy
from angelforge.targets import Target


@dataclass(frozen=True)
class PlanRequest:
    """What is to be planned. `memory_bytes` of one device, needed where the target does not say it (the CPU)."""

    config: ModelConfig
    precision: Precision
    target: Target
    max_context: int
    tensor_parallel: int = 1
    page_size: int = 64
    max_tokens: int = 8192  # in one step
    max_batch: int = 32
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Capacity:
    """How many sequences of `context` tokens the cache holds at once; None where the context is too long."""

    context: int
    sequences: int | None


@dataclass(frozen=True)
class Plan:
    """The answer. Bytes are those of one device (rank) unless named total."""

    target: str
    precision: str
    tensor_parallel: int
    max_context: int
    page_size: int
    memory: int
    weights: tuple[WeightBytes, ...]
    weights_total: int
    weights_per_rank: int
    reserve_activations: int
    reserve_device: int
    left: int  # for the cache; negative if the rest does not even fit
    needed: int  # memory with which one sequence of max_context fits
    kv_dtype: str
    kv_bytes_per_token: int
    pages: int  # page 0 included, which no sequence gets
    tokens: int
    capacities: tuple[Capacity, ...]
    fits: bool  # weights, reserves and one sequence of max_context
    problem: str | None
    remedies: tuple[str, ...]
    limits: tuple[DecodeLimit, ...]

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values."""
        saved = dataclasses.asdict(self)
        saved["weights"] = [
            {"kind": w.kind.value, "total": w.total, "per_rank": w.per_rank, "split": w.kind.split}
            for w in self.weights
        ]
        return saved


def can_split(c: ModelConfig, ranks: int, precision: Precision) -> bool:
    """Whether key/value heads and intermediate widths divide evenly over `ranks` (in FP8 in multiples of a block)."""
    widths = [c.intermediate_size] * (c.first_k_dense_replace > 0) + [c.moe_intermediate_size] * (c.num_moe_layers > 0)
    unit = 128 if precision.quantized and ranks > 1 else 1
    return c.num_key_value_heads % ranks == 0 and all(width % (ranks * unit) == 0 for width in widths)


def check_request(request: PlanRequest) -> None:
    """Raises UsageError for what is impossible whatever the memory."""
    c, ranks = request.config, request.tensor_parallel
    for name in ("max_context", "tensor_parallel", "page_size", "max_tokens", "max_batch"):
        if getattr(request, name) < 1:
            raise UsageError(f"{name} is {getattr(request, name)}, but at least 1 is needed.")
    if request.max_context > c.max_context:
        raise UsageError(
            f"A context of {request.max_context} was asked for, but the model covers {c.max_context} positions. "
            f"{too_long_remedy(c, request.max_context)}"
        )
    if not can_split(c, ranks, request.precision):
        possible = [str(n) for n in range(1, c.num_key_value_heads + 1) if can_split(c, n, request.precision)]
        raise UsageError(
            f"The model cannot be split over {ranks} ranks: key/value heads ({c.num_key_value_heads}) and intermediate "
            f"widths must divide evenly, in FP8 in multiples of 128. Possible: {', '.join(possible)}."
        )
    if ranks > 1 and request.target.backend == "onnxruntime":
        raise UsageError(f"The target {request.target.name} runs on one rank, but {ranks} were asked for.")
