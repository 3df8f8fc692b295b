"""The memory planner: from a configuration alone, what a model needs on a target, whether it fits, and what helps."""

from __future__ import annotations

import dataclasses

from angelforge.dtypes import DType
from angelforge.engines.communication import communication
from angelforge.engines.decode_limit import DecodeLimit, decode_limit
from angelforge.engines.footprint import (
    WeightBytes,
    activation_bytes,
    draft_bytes,
    draft_kv_bytes_per_token,
    kv_bytes_per_token,
    partial_bytes,
    weight_bytes,
)
from angelforge.engines.plan_types import Capacity, Plan, PlanRequest, check_request
from angelforge.engines.remedies import find_remedies
from angelforge.errors import UsageError
from angelforge.ranks import rank_config

__all__ = ["Capacity", "Plan", "PlanRequest", "plan"]

CONTEXTS = (4096, 32768, 131072)  # for which the number of sequences is told
BATCHES = (1, 8, 32)  # for which the physical limit is told, at LIMIT_CONTEXT tokens each
LIMIT_CONTEXT = 1024
# CUDA context, loaded kernels, engine and the allocator's rounding; on a CPU the process itself.
DEVICE_RESERVE, CPU_RESERVE = 1_500_000_000, 300_000_000
_LARGEST_SLOT = 2**31 - 1  # a slot number is an int32


def plan(request: PlanRequest) -> Plan:
    """Plans `request`. Raises UsageError if it is impossible whatever the memory: too long a context, odd ranks."""
    found = _plan_once(request)
    if found.fits:
        return found
    remedies = find_remedies(
        request, found, lambda changed: _plan_once(dataclasses.replace(changed, activations=None)).fits
    )
    return dataclasses.replace(found, remedies=remedies)


def _plan_once(request: PlanRequest) -> Plan:
    check_request(request)
    c, target, ranks = request.config, request.target, request.tensor_parallel
    # ONNX Runtime has no bf16 arithmetic on a CPU: for it a build widens the pool and all activations to f32.
    dtype = DType.F32 if target.backend == "onnxruntime" else request.precision.activation
    memory = _memory(request)
    weights = weight_bytes(c, request.precision, request.max_context, ranks)
    if request.draft is not None:
        weights += draft_bytes(request.draft, request.precision, request.max_context)
    per_rank = sum(item.per_rank for item in weights)
    part = rank_config(c, request.precision, ranks)
    activations = request.activations
    if activations is None:
        activations = activation_bytes(part, dtype, request.max_tokens, request.max_batch, ranks)
    device = CPU_RESERVE if target.device == "cpu" else DEVICE_RESERVE
    left = memory - per_rank - activations - device
    kv = kv_bytes_per_token(part, dtype)
    page = kv * request.page_size + partial_bytes(part, request.page_size, 0)
    draft_kv = 0 if request.draft is None else draft_kv_bytes_per_token(request.draft, dtype)
    page += draft_kv * request.page_size  # a draft has a page of its own for each of the target's
    pages = min(max(left, 0) // page, _LARGEST_SLOT // request.page_size)
    usable = max(pages - 1, 0)
    needed = memory - left + (_pages_of(request.max_context, request) + 1) * page
    fits = needed <= memory
    return Plan(
        target=target.name,
        precision=request.precision.value,
        tensor_parallel=ranks,
        max_context=request.max_context,
        page_size=request.page_size,
        memory=memory,
        weights=weights,
        weights_total=sum(item.total for item in weights),
        weights_per_rank=per_rank,
        reserve_activations=activations,
        activations_known=request.activations is not None,
        reserve_device=device,
        left=left,
        needed=needed,
        kv_dtype=dtype.value,
        kv_bytes_per_token=kv,
        page_bytes=page,
        pages=pages,
        tokens=usable * request.page_size,
        capacities=tuple(
            Capacity(n, usable // _pages_of(n, request) if n <= request.max_context else None) for n in CONTEXTS
        ),
        fits=fits,
        problem=None if fits else _problem(left, usable, needed, request),
        remedies=(),
        limits=_limits(request, tuple(item for item in weights if not item.kind.drafted), kv),
    )


def _memory(request: PlanRequest) -> int:
    memory = request.target.memory_bytes if request.memory_bytes is None else request.memory_bytes
    if memory is None or memory < 1:
        raise UsageError(f"The memory of target {request.target.name} is not known: say how much it has.")
    return memory


def _pages_of(tokens: int, request: PlanRequest) -> int:
    return -(-tokens // request.page_size)


def _problem(left: int, usable: int, needed: int, request: PlanRequest) -> str:
    if left < 0:
        return (
            f"Weights and reserves exceed the memory by {-left / 1e9:.1f} GB; with one sequence of "
            f"{request.max_context} tokens each device needs {needed / 1e9:.1f} GB."
        )
    return (
        f"The memory left for the cache holds {usable * request.page_size} tokens, but one sequence of "
        f"{request.max_context} must fit: each device needs {needed / 1e9:.1f} GB."
    )


def _limits(request: PlanRequest, weights: tuple[WeightBytes, ...], kv: int) -> tuple[DecodeLimit, ...]:
    """The limits of plain decoding: what a round with a draft gives depends on what of it is accepted."""
    bandwidth = request.target.bandwidth
    if bandwidth is None:
        return ()
    context = min(LIMIT_CONTEXT, request.max_context)
    c, dtype, ranks = request.config, request.precision.activation, request.tensor_parallel
    link = request.target.link_bandwidth
    return tuple(
        decode_limit(c, weights, kv, bandwidth, batch, context, communication(c, dtype, batch, batch, ranks, link))
        for batch in BATCHES
    )
