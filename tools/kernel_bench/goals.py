"""The goals of the kernels (issue 3), and the GPU's nominal figures that shares are taken of."""

from dataclasses import dataclass
from typing import Literal

from angelforge.targets import TARGETS, Target
from angelforge.tools.kernel_bench.work import Work

Kind = Literal["achievable", "peak", "us"]
_EXPERTS = {1: 0.70, 8: 0.85, 32: 0.88}  # of achievable bandwidth
_ROUTE = {1: 3.0, 64: 4.0}  # µs, at most
_PREFILL = {"h200": 0.40, "h20": 0.75, "h20-141g": 0.75}  # of the FP8 peak
PREFILL_TOKENS = 8192


@dataclass(frozen=True)
class Goal:
    """At least a share of achievable bandwidth or of peak FLOP/s, or at most so many µs."""

    kind: Kind
    value: float

    def met(self, found: float) -> bool:
        """Whether a figure of that kind reaches it."""
        return found <= self.value if self.kind == "us" else found >= self.value

    def __str__(self) -> str:
        return f"≤ {self.value:g} µs" if self.kind == "us" else f"≥ {100 * self.value:.0f} % {self.kind}"


def goal_of(work: Work, target: Target | None) -> Goal | None:
    """The goal of a call on a GPU, where there is one."""
    name, tokens = work.operator.name, work.tokens
    if name in ("Fp8MoEGateUp", "Fp8MoEDown") and tokens in _EXPERTS:
        return Goal("achievable", _EXPERTS[tokens])
    if name == "PagedAttention" and work.label == "128K":
        return Goal("achievable", 0.90)
    if name == "MoERoute" and tokens in _ROUTE:
        return Goal("us", _ROUTE[tokens])
    if name.startswith("Fp8") and tokens == PREFILL_TOKENS and target is not None and target.name in _PREFILL:
        return Goal("peak", _PREFILL[target.name])
    return None


def target_of(gpu_name: str, memory_bytes: int) -> Target | None:
    """The target that a GPU is, by its name as the driver tells it ("NVIDIA H200"); None for one without a row."""
    words = gpu_name.lower().replace("geforce", "").replace("nvidia", "").split()
    name = "".join(words[:2]) if words[:1] == ["rtx"] else words[0] if words else ""
    if name == "h20" and memory_bytes > 120e9:
        name = "h20-141g"
    return TARGETS.get(name)


def peak_flops(work: Work, target: Target) -> float | None:
    """The nominal rate of the tensor cores that the call uses, FLOP/s."""
    return target.fp8_flops if work.operator.name.startswith("Fp8") else target.bf16_flops
