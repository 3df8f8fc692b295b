"""What the memory planner is asked, and what it answers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from angelforge.config import ModelConfig
from angelforge.draft_config import DraftConfig
from angelforge.engines.decode_limit import DecodeLimit
from angelforge.engines.footprint import WeightBytes
from angelforge.errors import UsageError
from angelforge.precision import Precision
from angelforge.ranks import rank_config
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
    draft: DraftConfig | None = None
    activations: int | None = None  # bytes that an engine of these sizes takes, where one has been built


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
    activations_known: bool  # from a built engine; else an upper estimate
    reserve_device: int
    left: int  # for the cache; negative if the rest does not even fit
    needed: int  # memory with which one sequence of max_context fits
    kv_dtype: str
    kv_bytes_per_token: int
    page_bytes: int  # what a page takes: its keys and values, and its part of attention's buffers
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
    rank_config(c, request.precision, ranks)
    request.target.check_ranks(ranks)
    if ranks > 1 and request.target.backend == "onnxruntime":
        raise UsageError(f"Ranks on a CPU share its memory: plan the target {request.target.name} for one rank.")
