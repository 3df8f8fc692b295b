"""vLLM's kernels: FP8 matmuls, experts, routing, norms, RoPE, FlashAttention 3 (github.com/vllm-project/vllm).

Names and arguments as in vLLM 0.33.0. Its experts take gate and up in one tensor, the sum over a token's experts
weighted in the second matmul; here the second matmul writes every expert's row unweighted, as Fp8MoEDown does.
"""

from importlib import import_module
from typing import Any

import torch

from angelforge.tools.kernel_bench.rivals.layouts import by_column, stacked
from angelforge.tools.kernel_bench.rivals.rival import Engine, Rival, Shared, Tensors
from angelforge.tools.kernel_bench.work import Work

BLOCK = [128, 128]
FP8 = torch.float8_e4m3fn


def _part(vllm: Any, name: str) -> Any:
    return import_module(f"{vllm.__name__}.{name}")


def _ops(vllm: Any) -> Any:
    return _part(vllm, "_custom_ops")


def _experts(vllm: Any) -> Any:
    return _part(vllm, "model_executor.layers.fused_moe.fused_moe")


class Kept:
    """The result of the last call of a function that makes new tensors; the call of the rival."""

    def __init__(self, function: Any, *arguments: Any, **named: Any) -> None:
        self.function, self.arguments, self.named = function, arguments, named
        self.result: Any = None

    def __call__(self) -> None:
        """Keeps one result at a time: its memory is used again by the next call."""
        self.result = None
        self.result = self.function(*self.arguments, **self.named)


def norm(vllm: Any, work: Work, i: Tensors, shared: Shared) -> Rival:
    """Norm."""
    y, epsilon, ops = torch.empty_like(i["hidden"]), float(work.attributes["epsilon"]), _ops(vllm)
    return Rival("rms_norm", lambda: ops.rms_norm(y, i["hidden"], i["weight"], epsilon), lambda: (y,))


def add_norm(vllm: Any, work: Work, i: Tensors, shared: Shared) -> Rival:
    """AddNorm; it changes both of its inputs, which are copies."""
    delta, total, ops = i["delta"].clone(), i["residual"].clone(), _ops(vllm)
    epsilon = float(work.attributes["epsilon"])
    call = lambda: ops.fused_add_rms_norm(delta, total, i["weight"], epsilon)  # noqa: E731
    return Rival("fused_add_rms_norm", call, lambda: (total, delta))


def norm_quantize(vllm: Any, work: Work, i: Tensors, shared: Shared) -> Rival:
    """NormQuantize without the normed values, AddNormQuantize likewise."""
    epsilon = float(work.attributes["epsilon"])
    total = i["residual"].clone() if "residual" in i else None  # the sum goes here
    hidden = i["delta"] if total is not None else i["hidden"]
    kept = Kept(_ops(vllm).rms_norm_per_block_quant, hidden, i["weight"], epsilon, FP8, [1, 128], residual=total)

    def outputs() -> tuple[torch.Tensor | None, ...]:
        return *([total] * (total is not None)), None, *(kept.result)

    return Rival("rms_norm_per_block_quant", kept, outputs, "does not write the normed values in bf16")


def linear_triton(vllm: Any, work: Work, i: Tensors, shared: Shared) -> Rival:
    """Fp8Linear by vLLM's Triton kernel."""
    matmul = _part(vllm, "model_executor.layers.quantization.utils.fp8_utils").w8a8_triton_block_scaled_mm
    kept = Kept(matmul, i["x"], i["weight"], i["x_scale"], i["weight_scale"], BLOCK, output_dtype=torch.bfloat16)
    return Rival("w8a8_triton_block_scaled_mm", kept, lambda: (kept.result,))


def linear_cutlass(vllm: Any, work: Work, i: Tensors, shared: Shared) -> Rival:
    """Fp8Linear by CUTLASS; scales of x column by column, those of the weight transposed."""
    scales = {"scale_a": by_column(i["x_scale"]), "scale_b": i["weight_scale"].T}
    kept = Kept(_ops(vllm).cutlass_scaled_mm, i["x"], i["weight"].T, out_dtype=torch.bfloat16, **scales)
    return Rival("cutlass_scaled_mm", kept, lambda: (kept.result,))


def route(vllm: Any, work: Work, i: Tensors, shared: Shared) -> Rival:
    """MoERoute's choice of experts; neither the shared expert nor the choice by expert."""
    names = ("n_group", "topk_group", "top_k")
    groups, chosen, per_token = (int(work.attributes[name]) for name in names)
    factor, extra = float(work.attributes["routed_scaling_factor"]), int(work.attributes["num_shared_experts"])
    function = _ops(vllm).grouped_topk
    # scoring_func 1: by sigmoid
    kept = Kept(function, i["logits"], groups, chosen, per_token, True, factor, i["bias"], scoring_func=1)

    def outputs() -> tuple[torch.Tensor | None, ...]:
        weights, ids = kept.result
        everyone = (torch.arange(extra, device=ids.device) + i["logits"].shape[1]).expand(len(ids), extra)
        one = torch.ones((len(ids), extra), device=ids.device)
        return torch.cat((ids.int(), everyone.int()), 1), torch.cat((weights.float(), one), 1), None

    return Rival("grouped_topk", kept, outputs, "without the shared expert and the bits by expert")


def _grouped(vllm: Any, x: Any, weight: Any, ids: torch.Tensor, per_row: int, sizes: Any) -> tuple[Any, torch.Tensor]:
    """(the call, its result bf16 [T, k, N]): x [T, K] with `per_row` experts a row, or [T·k, K] with one."""
    moe, experts, (tokens, per_token) = _experts(vllm), len(weight[0]), ids.shape
    config = moe.try_get_optimal_moe_config(*sizes, per_token, "fp8_w8a8", tokens, block_shape=BLOCK)
    block = config["BLOCK_SIZE_M"]
    if ids.numel() * 4 <= experts:  # vLLM's rule: every entry has a block of its own
        order, expert = None, ids.flatten()
        total = torch.full((1,), ids.numel() * block, dtype=torch.int32, device=ids.device)
    else:
        order, expert, total = moe.moe_align_block_size(ids, block, experts)
    y = torch.empty((*ids.shape, weight[0].shape[1]), dtype=torch.bfloat16, device=ids.device)
    compute = import_module("triton.language").bfloat16

    def call() -> None:
        moe.invoke_fused_moe_triton_kernel(
            x[0], weight[0], y, x[1], weight[1], None, order, expert, total, False, per_row, config,
            compute_type=compute, use_fp8_w8a8=True, use_int8_w8a8=False, use_int8_w8a16=False, use_int4_w4a16=False,
            per_channel_quant=False, block_shape=BLOCK,
        )  # fmt: skip

    return call, y


def _expert_sizes(i: Tensors, work: Work) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of both stacks: vLLM looks its tiles up by them."""
    experts, width, hidden = (work.dims[symbol] for symbol in ("E", "I", "H"))
    return (experts, 2 * width, hidden), (experts, hidden, width)


def moe_gate_up(vllm: Any, work: Work, i: Tensors, shared: Shared) -> Rival:
    """Fp8MoEGateUp: the grouped matmul, then SwiGLU with quantisation."""
    ids, ops = i["expert_ids"], _ops(vllm)
    weight = shared.get("gate, up", i["gate"], lambda: stacked(i["gate"], i["up"]))
    scale = shared.get("scales", i["gate_scale"], lambda: stacked(i["gate_scale"], i["up_scale"]))
    sizes = _expert_sizes(i, work)
    matmul, wide = _grouped(vllm, (i["x"], i["x_scale"]), (weight, scale), ids, ids.shape[1], sizes)
    swiglu = Kept(ops.silu_and_mul_per_block_quant, wide.flatten(0, 1), 128, FP8)

    def call() -> None:
        matmul()
        swiglu()

    def outputs() -> tuple[torch.Tensor, ...]:
        return tuple(part.unflatten(0, ids.shape) for part in swiglu.result)

    return Rival("fused_moe_kernel, silu_and_mul_per_block_quant", call, outputs, "two kernels; tokens sorted before")


def moe_down(vllm: Any, work: Work, i: Tensors, shared: Shared) -> Rival:
    """Fp8MoEDown."""
    inner = i["inner"].flatten(0, 1), i["inner_scale"].flatten(0, 1)
    weight = i["down"], i["down_scale"]
    call, y = _grouped(vllm, inner, weight, i["expert_ids"], 1, _expert_sizes(i, work))
    return Rival("fused_moe_kernel", call, lambda: (y,), "tokens sorted before")


def qkv_prepare(vllm: Any, work: Work, i: Tensors, shared: Shared) -> Rival:
    """QKVPrepare without the write into the pool."""
    a, dim, qkv, ops = work.attributes, work.dims["D"], i["qkv"].clone(), _ops(vllm)
    heads, kv_heads = int(a["num_heads"]), int(a["num_kv_heads"])
    table = torch.cat((i["rope_cos"], i["rope_sin"]), 1).to(qkv.dtype)  # as vLLM keeps it
    where = i["positions"].long()

    def call() -> None:
        ops.fused_qk_norm_rope(
            qkv, heads, kv_heads, kv_heads, dim, float(a["epsilon"]), i["q_norm"], i["k_norm"], table, True, where
        )

    def outputs() -> tuple[torch.Tensor | None, ...]:
        return qkv[:, : heads * dim].unflatten(1, (heads, dim)), None

    return Rival("fused_qk_norm_rope", call, outputs, "does not write into the pool")


def attention(vllm: Any, work: Work, i: Tensors, shared: Shared) -> Rival:
    """PagedAttention and AttentionMerge, by FlashAttention 3 on our pool: its views swap axes, no copy is made."""
    assert work.sequences is not None
    keys, values = (i["kv_cache"][:, side].transpose(1, 2) for side in (0, 1))  # [pages, page_size, Hkv, D]
    y = torch.empty_like(i["query"])
    most = max(tokens for _, tokens in work.sequences.items)
    attend = _part(vllm, "vllm_flash_attn").flash_attn_varlen_func
    named = {
        "max_seqlen_q": most,
        "cu_seqlens_q": i["query_start"],
        "max_seqlen_k": max(work.sequences.lengths),
        "seqused_k": i["kv_length"],
        "block_table": i["page_table"],
        "softmax_scale": float(work.attributes["scale"]),
    }
    kept = Kept(attend, i["query"], keys, values, **named, causal=True, out=y, fa_version=3)
    return Rival("flash_attn_varlen_func, version 3", kept, lambda: (y,), "joins its parts")


VLLM = Engine(
    "vLLM",
    ("vllm",),
    {
        "Norm": (norm,),
        "AddNorm": (add_norm,),
        "NormQuantize": (norm_quantize,),
        "AddNormQuantize": (norm_quantize,),
        "Fp8Linear": (linear_triton, linear_cutlass),
        "MoERoute": (route,),
        "Fp8MoEGateUp": (moe_gate_up,),
        "Fp8MoEDown": (moe_down,),
        "QKVPrepare": (qkv_prepare,),
        "PagedAttention": (attention,),
    },
)
