"""DeepGEMM's FP8 matmuls with 128×128 scales, dense and grouped (github.com/deepseek-ai/DeepGEMM, version 2).

Names and arguments as in version 2.8.1, which the wheel of vLLM 0.33.0 carries as `vllm.third_party.deep_gemm`. The
package `deep-gemm` 1.0.0 of the public index has other names and is told as "not run". Activation scales are handed
over column by column with padded columns, as DeepGEMM's `get_mn_major_tma_aligned_tensor` makes them, so that no call
has to.
"""

from typing import Any

import torch

from angelforge.tools.kernel_bench.plain import quantized
from angelforge.tools.kernel_bench.rivals.layouts import contiguous_rows, masked_rows, scattered, stacked
from angelforge.tools.kernel_bench.rivals.rival import Engine, Rival, Shared, Tensors
from angelforge.tools.kernel_bench.work import Work

MASKED_TOKENS = 128  # up to so many, every expert has room of its own, as engines do while decoding
ROWS = 128  # tiles of the masked layout never reach into the next expert


def linear(gemm: Any, work: Work, i: Tensors, shared: Shared) -> Rival:
    """Fp8Linear."""
    y = torch.empty((len(i["x"]), len(i["weight"])), dtype=torch.bfloat16, device=i["x"].device)
    x = i["x"], gemm.get_mn_major_tma_aligned_tensor(i["x_scale"])
    weight = i["weight"], i["weight_scale"]
    return Rival("fp8_gemm_nt", lambda: gemm.fp8_gemm_nt(x, weight, y, disable_ue8m0_cast=True), lambda: (y,))


def moe_gate_up(gemm: Any, work: Work, i: Tensors, shared: Shared) -> Rival:
    """The matmul of Fp8MoEGateUp; SwiGLU and quantisation follow in an engine."""
    gate, up = i["gate"], i["up"]
    weight = shared.get("gate, up", gate, lambda: stacked(gate, up))
    scale = shared.get("scales", i["gate_scale"], lambda: stacked(i["gate_scale"], i["up_scale"]))
    per_token = i["expert_ids"].shape[1]
    x, x_scale = (i[name].repeat_interleave(per_token, 0) for name in ("x", "x_scale"))
    rival, wide = _grouped(gemm, work, i["expert_ids"], (x, x_scale), (weight, scale))

    def outputs() -> tuple[torch.Tensor, ...]:
        gated, upper = wide().float().chunk(2, -1)
        return quantized(torch.nn.functional.silu(gated) * upper)

    return Rival(rival.name, rival.call, outputs, "the matmul alone, its rows gathered before")


def moe_down(gemm: Any, work: Work, i: Tensors, shared: Shared) -> Rival:
    """Fp8MoEDown."""
    inner = i["inner"].flatten(0, 1), i["inner_scale"].flatten(0, 1)
    rival, wide = _grouped(gemm, work, i["expert_ids"], inner, (i["down"], i["down_scale"]))
    return Rival(rival.name, rival.call, lambda: (wide(),), "its rows gathered before")


def _grouped(gemm: Any, work: Work, ids: torch.Tensor, x: Any, weight: Any) -> Any:
    """(the rival, its result [T, k, N]) of rows x [T·k, K] with their scales."""
    experts, channels = weight[0].shape[:2]
    make = _masked if work.tokens <= MASKED_TOKENS else _contiguous
    name, call, rows, y = make(gemm, ids, x, weight, experts, channels)
    return Rival(name, call, tuple), lambda: y.view(-1, channels)[rows].unflatten(0, ids.shape)


def _masked(gemm: Any, ids: torch.Tensor, x: Any, weight: Any, experts: int, channels: int) -> Any:
    rows, counts, most = masked_rows(ids, experts, ROWS)
    own, scale = (scattered(part, rows, experts * most).unflatten(0, (experts, most)) for part in x)
    aligned = gemm.get_mn_major_tma_aligned_tensor(scale)
    y = torch.empty((experts, most, channels), dtype=torch.bfloat16, device=own.device)
    expected = max(1, -(-ids.numel() // experts))

    def call() -> None:
        gemm.m_grouped_fp8_gemm_nt_masked((own, aligned), weight, y, counts, expected, disable_ue8m0_cast=True)

    return "m_grouped_fp8_gemm_nt_masked", call, rows, y


def _contiguous(gemm: Any, ids: torch.Tensor, x: Any, weight: Any, experts: int, channels: int) -> Any:
    rows, expert = contiguous_rows(ids, experts, int(gemm.get_mk_alignment_for_contiguous_layout()))
    own, scale = (scattered(part, rows, len(expert)) for part in x)
    aligned = gemm.get_mn_major_tma_aligned_tensor(scale)
    y = torch.empty((len(expert), channels), dtype=torch.bfloat16, device=own.device)

    def call() -> None:
        gemm.m_grouped_fp8_gemm_nt_contiguous((own, aligned), weight, y, expert, disable_ue8m0_cast=True)

    return "m_grouped_fp8_gemm_nt_contiguous", call, rows, y


DEEPGEMM = Engine(
    "DeepGEMM",
    ("deep_gemm", "vllm.third_party.deep_gemm"),
    {"Fp8Linear": (linear,), "Fp8MoEGateUp": (moe_gate_up,), "Fp8MoEDown": (moe_down,)},
)
