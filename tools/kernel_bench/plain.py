"""Operators in plain torch, in f32 and without care for speed: the truth at sizes that a CPU cannot follow.

Written from the operators' documentation, not from their bodies or kernels. Each takes inputs and attributes by name
and gives the outputs in order.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]
Outputs = tuple[torch.Tensor, ...]
BLOCK = 128
_DTYPES = {1: torch.float32, 16: torch.bfloat16}


def plain_outputs(name: str, inputs: Tensors, attributes: Mapping[str, Any]) -> Outputs | None:
    """The outputs of the operator `name`; None for an operator that is not here."""
    function = _PLAIN.get(name)
    return None if function is None else function(inputs, attributes)


def spread(value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """f32: e4m3 by groups of 128 columns, or by blocks of 128×128 where scales are fewer than rows."""
    wide = scale.repeat_interleave(BLOCK, -1)[..., : value.shape[-1]]
    if scale.shape[-2] != value.shape[-2]:
        wide = wide.repeat_interleave(BLOCK, -2)[..., : value.shape[-2], :]
    return value.float() * wide


def quantized(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3, scales) by groups of 128 of f32 [..., n]; n is a multiple of 128."""
    groups = value.unflatten(-1, (-1, BLOCK))
    scale = groups.abs().amax(-1).clamp_min(1e-10) / 448
    return (groups / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn).flatten(-2), scale


def _normed(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    wide = x.float()
    unit = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)
    return unit * weight


def _norm(i: Tensors, a: Mapping[str, Any]) -> Outputs:
    return (_normed(i["hidden"], i["weight"], a["epsilon"]),)


def _add_norm(i: Tensors, a: Mapping[str, Any]) -> Outputs:
    total = i["residual"] + i["delta"]
    return total, _normed(total, i["weight"], a["epsilon"])


def _then_quantized(function: Callable[[Tensors, Mapping[str, Any]], Outputs]) -> Any:
    def both(i: Tensors, a: Mapping[str, Any]) -> Outputs:
        outputs = function(i, a)
        return *outputs, *quantized(outputs[-1].float())

    return both


def _embedding(i: Tensors, a: Mapping[str, Any]) -> Outputs:
    return (i["table"][i["input_ids"]].to(_DTYPES[a["dtype"]]),)


def _weight(i: Tensors, name: str) -> torch.Tensor:
    return spread(i[name], i[f"{name}_scale"]) if f"{name}_scale" in i else i[name].float()


def _linear(i: Tensors, a: Mapping[str, Any]) -> Outputs:
    x = _weight(i, "x")
    rows = 16384  # of the weight at a time
    scale = i.get("weight_scale")
    parts = []
    for start in range(0, len(i["weight"]), rows):
        part = {"weight": i["weight"][start : start + rows]}
        if scale is not None:
            part["weight_scale"] = scale[start // BLOCK : (start + rows) // BLOCK]
        parts.append(x @ _weight(part, "weight").T)
    return (torch.cat(parts, 1).to(_DTYPES[a["dtype"]]),)


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


def _gate_up(i: Tensors, a: Mapping[str, Any]) -> Outputs:
    x = _weight(i, "x")
    inner = _swiglu(x @ _weight(i, "gate").T, x @ _weight(i, "up").T)
    return quantized(inner) if "gate_scale" in i else (inner.to(i["x"].dtype),)


def _expert(i: Tensors, name: str, expert: int) -> torch.Tensor:
    part = {key: i[key][expert] for key in (name, f"{name}_scale") if key in i}
    return _weight(part, name)


def _moe_gate_up(i: Tensors, a: Mapping[str, Any]) -> Outputs:
    x, ids = _weight(i, "x"), i["expert_ids"]
    inner = torch.zeros((*ids.shape, i["gate"].shape[1]), device=x.device)
    for expert in ids[ids >= 0].unique().tolist():
        token, place = torch.nonzero(ids == expert, as_tuple=True)
        rows = x[token]
        inner[token, place] = _swiglu(rows @ _expert(i, "gate", expert).T, rows @ _expert(i, "up", expert).T)
    return quantized(inner) if "gate_scale" in i else (inner.to(i["x"].dtype),)


def _moe_down(i: Tensors, a: Mapping[str, Any]) -> Outputs:
    inner, ids = _weight(i, "inner"), i["expert_ids"]
    dtype = _DTYPES[a["dtype"]] if "dtype" in a else i["inner"].dtype
    out = torch.zeros((*ids.shape, i["down"].shape[1]), device=inner.device, dtype=dtype)
    for expert in ids[ids >= 0].unique().tolist():
        token, place = torch.nonzero(ids == expert, as_tuple=True)
        out[token, place] = (inner[token, place] @ _expert(i, "down", expert).T).to(dtype)
    return (out,)


def _moe_logits(i: Tensors, a: Mapping[str, Any]) -> Outputs:
    return (i["hidden"].float() @ i["weight"].T,)


def _moe_combine(i: Tensors, a: Mapping[str, Any]) -> Outputs:
    weighted = i["expert_out"].float() * i["expert_weights"][..., None]
    first = weighted.shape[1] - a["num_shared_experts"]
    routed, shared = (part.sum(1).to(i["expert_out"].dtype) for part in (weighted[:, :first], weighted[:, first:]))
    return (routed + shared,)


def _attention(i: Tensors, a: Mapping[str, Any]) -> Outputs:
    """[T, Hq, D]: what `direct` would be if no sequence were left in parts; see `compare.joined`."""
    query, pool, starts = i["query"].float(), i["kv_cache"], i["query_start"].tolist()
    result = torch.zeros_like(query)
    group = query.shape[1] // pool.shape[2]
    for row, length in enumerate(i["kv_length"].tolist()):
        pages = i["page_table"][row, : -(-length // pool.shape[3])].long()
        keys, values = (
            pool[pages, side].transpose(0, 1).flatten(1, 2)[:, :length].float() for side in (0, 1)
        )  # [Hkv, L, D]
        for first in range(starts[row], starts[row + 1], 256):
            own = slice(first, min(first + 256, starts[row + 1]))
            q = query[own].unflatten(1, (-1, group)).transpose(0, 1).flatten(1, 2)  # [Hkv, t·G, D]
            scores = (q @ keys.transpose(1, 2) * a["scale"]).unflatten(1, (-1, group))  # [Hkv, t, G, L]
            hidden = torch.arange(length, device=query.device) > i["positions"][own, None]
            weights = scores.masked_fill_(hidden[None, :, None], float("-inf")).softmax(-1).flatten(1, 2)
            result[own] = (weights @ values).unflatten(1, (-1, group)).transpose(0, 1).flatten(1, 2)
    return (result.to(i["query"].dtype),)


def merged(i: Tensors, a: Mapping[str, Any]) -> torch.Tensor:
    """AttentionMerge's documentation in torch: [T, Hq·D] in direct's type."""
    result, starts = i["direct"].clone(), i["query_start"].tolist()
    lengths, firsts = i["kv_length"].tolist(), i["partial_start"].tolist()
    for row, first in enumerate(firsts):
        tokens = starts[row + 1] - starts[row]
        if first < 0 or tokens <= 0:
            continue
        parts = -(-lengths[row] // a["split_length"])
        rows = slice(first, first + tokens * parts)
        share = i["lse"][rows].unflatten(0, (tokens, parts)).softmax(1)[..., None]
        partial = i["partial"][rows].unflatten(0, (tokens, parts))
        result[starts[row] : starts[row + 1]] = torch.where(share > 0, partial * share, 0).sum(1).to(result.dtype)
    return result.flatten(1)


def _merge(i: Tensors, a: Mapping[str, Any]) -> Outputs:
    return (merged(i, a),)


def _merge_quantized(i: Tensors, a: Mapping[str, Any]) -> Outputs:
    return quantized(merged(i, a).float())


_PLAIN: dict[str, Callable[[Tensors, Mapping[str, Any]], Outputs]] = {
    "Embedding": _embedding,
    "Norm": _norm,
    "AddNorm": _add_norm,
    "NormQuantize": _then_quantized(_norm),
    "AddNormQuantize": _then_quantized(_add_norm),
    "Linear": _linear,
    "Fp8Linear": _linear,
    "GateUp": _gate_up,
    "Fp8GateUp": _gate_up,
    "MoELogits": _moe_logits,
    "MoEGateUp": _moe_gate_up,
    "Fp8MoEGateUp": _moe_gate_up,
    "MoEDown": _moe_down,
    "Fp8MoEDown": _moe_down,
    "MoECombine": _moe_combine,
    "PagedAttention": _attention,
    "AttentionMerge": _merge,
    "AttentionMergeQuantize": _merge_quantized,
}
