"""How far a kernel's outputs are from the truth: one number a call, and what it may be.

Floating-point outputs are compared row by row: ‖found − wanted‖ / ‖wanted‖ of the worst row, so that one wrong row
among thousands shows; quantised outputs after multiplication with their scales. Sums in another order and tensor cores
that keep 14 bits within a block move single values across a rounding step; wrong tiles, rows or scales are far above
the limits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from angelforge.plugins.operator import Operator
from angelforge.tools.kernel_bench.plain import merged, spread

FLOAT_LIMIT = {torch.float32: 2e-3, torch.bfloat16: 1e-2}
QUANTIZED_LIMIT = 3e-2  # one e4m3 step is 6 %; some per cent of the values may take one
CHOICE_LIMIT = 1e-3  # share of tokens whose experts differ: near ties, f32 sigmoids of two machines


@dataclass(frozen=True)
class Verdict:
    """The largest error over its limit (1 is the limit), and which output it was."""

    error: float
    limit: float
    output: str

    @property
    def ok(self) -> bool:
        """Within the limit; NaN is not."""
        return self.error <= self.limit


def compare(
    operator: Operator,
    inputs: Sequence[torch.Tensor],
    attributes: Mapping[str, Any],
    found: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
) -> Verdict:
    """The worst of the operator's outputs; `wanted` may stand on another device."""
    device = found[0].device
    named = dict(zip((port.name for port in operator.inputs), inputs, strict=True))
    if operator.name == "PagedAttention":
        return _worst([_floats("attended", joined(named, attributes, found), wanted[0].flatten(1).to(device))])
    wanted = [tensor.to(device) for tensor in wanted]
    if operator.name == "MoERoute":
        return _worst(_choices(found, wanted))
    verdicts, ports = [], [port.name for port in operator.outputs]
    pairs = list(zip(ports, found, wanted, strict=True))
    while pairs:
        name, ours, theirs = pairs.pop(0)
        if ours.dtype == torch.float8_e4m3fn:  # its scale follows
            _, our_scale, their_scale = pairs.pop(0)
            error = _row_error(spread(ours, our_scale), spread(theirs, their_scale))
            verdicts.append(Verdict(error, QUANTIZED_LIMIT, name))
        else:
            verdicts.append(_floats(name, ours, theirs))
    return _worst(verdicts)


def joined(inputs: Mapping[str, torch.Tensor], attributes: Mapping[str, Any], found: Sequence[torch.Tensor]) -> Any:
    """PagedAttention's outputs, with the sequences that it left in parts merged: [T, Hq·D]."""
    names = ("direct", "partial", "lse", "partial_start")
    return merged({**inputs, **dict(zip(names, found, strict=True))}, attributes)


def _worst(verdicts: list[Verdict]) -> Verdict:
    return max(verdicts, key=lambda v: float("inf") if v.error != v.error else v.error / v.limit)


def _floats(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> Verdict:
    return Verdict(_row_error(ours, theirs), FLOAT_LIMIT[ours.dtype], name)


def _row_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖ of the worst row of the last axis; in pieces, since heads are large."""
    worst = 0.0
    left, right = ours.flatten(0, -2) if ours.dim() > 1 else ours[None], theirs.reshape(-1, theirs.shape[-1])
    for start in range(0, len(left), 1024):
        a, b = left[start : start + 1024].float(), right[start : start + 1024].float()
        error = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-20)
        error = torch.where((a == b).all(-1), 0.0, error)
        if error.isnan().any():
            return float("nan")
        worst = max(worst, float(error.max()))
    return worst


def _choices(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> list[Verdict]:
    """expert_ids, expert_weights, expert_tokens: experts as sets; weights where the order is the same, too."""
    ids, weights, bits = found
    other = (ids.sort(1).values != wanted[0].sort(1).values).any(1)
    same = (ids == wanted[0]).all(1)
    error = _row_error(weights[same], wanted[1][same]) if bool(same.any()) else 0.0
    return [
        Verdict(float(other.float().mean()), CHOICE_LIMIT, "expert_ids"),
        Verdict(error, 1e-5, "expert_weights"),
        Verdict(_wrong_bits(ids, bits), 0.5, "expert_tokens"),
    ]


def _wrong_bits(ids: torch.Tensor, bits: torch.Tensor) -> float:
    """How many (token, expert) pairs `expert_tokens` tells otherwise than `expert_ids`."""
    experts, words = bits.shape
    told = (bits[..., None] >> torch.arange(32, device=bits.device, dtype=torch.int32)) & 1
    told = told.reshape(experts, words * 32)
    meant = torch.zeros_like(told)
    token, place = torch.nonzero(ids >= 0, as_tuple=True)
    meant[ids[token, place].long(), token] = 1
    return float((told != meant).sum())
