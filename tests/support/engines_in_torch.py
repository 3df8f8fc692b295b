"""The functions of other engines that the bench calls, in plain torch: their documented layouts, strictly.

They stand in where the packages cannot run (no GPU): what reaches them must be laid out as documented, and the result
says whether the bench meant the right thing. Parameters have the names and order of the real ones;
`test_rivals_signatures.py` compares them where a package is installed.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch

from angelforge.tools.kernel_bench.plain import quantized, spread

BLOCK = 128
FP8 = torch.float8_e4m3fn


# DeepGEMM


def _unpack(pair: Any) -> tuple[torch.Tensor, torch.Tensor]:
    value, scale = pair
    assert value.dtype == FP8 and value.is_contiguous() and scale.dtype == torch.float32
    return value, scale


def get_mn_major_tma_aligned_tensor(sf: Any) -> torch.Tensor:
    """Column after column of the last two axes, each padded to 16 bytes."""
    rows = -(-sf.shape[-2] // 4) * 4
    flat = torch.full((*sf.shape[:-2], sf.shape[-1], rows), float("nan"))
    flat[..., : sf.shape[-2]] = sf.transpose(-1, -2)
    return flat.transpose(-1, -2)[..., : sf.shape[-2], :]


def get_mk_alignment_for_contiguous_layout() -> int:
    return 128


def fp8_gemm_nt(
    a: Any, b: Any, d: Any, c: Any = None, recipe: Any = None, recipe_a: Any = None, recipe_b: Any = None,
    compiled_dims: str = "nk", disable_ue8m0_cast: bool = False,
) -> None:  # fmt: skip
    (x, x_scale), (weight, weight_scale) = _unpack(a), _unpack(b)
    assert x_scale.stride(0) == 1 and disable_ue8m0_cast
    d.copy_(spread(x, x_scale) @ spread(weight, weight_scale).T)


def m_grouped_fp8_gemm_nt_masked(
    a: Any, b: Any, d: Any, masked_m: Any, expected_m: int, recipe: Any = None, recipe_a: Any = None,
    recipe_b: Any = None, compiled_dims: str = "nk", disable_ue8m0_cast: bool = False,
) -> None:  # fmt: skip
    (x, x_scale), (weight, weight_scale) = _unpack(a), _unpack(b)
    assert x_scale.stride(1) == 1 and masked_m.dtype == torch.int32 and x.shape[1] % BLOCK == 0
    assert 1 <= expected_m <= x.shape[1] and len(masked_m) == len(x) == len(weight) == len(d)
    d.fill_(float("nan"))
    for group, rows in enumerate(masked_m.tolist()):
        wide = spread(x[group, :rows], x_scale[group, :rows])
        d[group, :rows] = (wide @ spread(weight[group], weight_scale[group]).T).to(d.dtype)


def m_grouped_fp8_gemm_nt_contiguous(
    a: Any, b: Any, d: Any, grouped_layout: Any, recipe: Any = None, recipe_a: Any = None, recipe_b: Any = None,
    compiled_dims: str = "nk", disable_ue8m0_cast: bool = False,
) -> None:  # fmt: skip
    (x, x_scale), (weight, weight_scale) = _unpack(a), _unpack(b)
    assert x_scale.stride(0) == 1 and grouped_layout.dtype == torch.int32 and len(grouped_layout) % BLOCK == 0
    for tile in grouped_layout.unflatten(0, (-1, BLOCK)):  # a tile of rows is one expert's, its padding last
        assert tile[0] >= 0 and set(tile.tolist()) <= {int(tile[0]), -1} and not bool((tile.diff() > 0).any())
    for group in grouped_layout[grouped_layout >= 0].unique().tolist():
        own = grouped_layout == group
        d[own] = (spread(x[own], x_scale[own]) @ spread(weight[group], weight_scale[group]).T).to(d.dtype)


# vLLM, and FlashInfer's norms


def _normed(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x.float(), weight.shape, weight.float(), epsilon)


def rms_norm(out: Any, input: Any, weight: Any, epsilon: float) -> None:  # noqa: A002
    out.copy_(_normed(input, weight, epsilon))


def fused_add_rms_norm(input: Any, residual: Any, weight: Any, epsilon: float) -> None:  # noqa: A002
    residual += input
    input.copy_(_normed(residual, weight, epsilon))


def rms_norm_per_block_quant(
    input: Any, weight: Any, epsilon: float, quant_dtype: Any, group_size: Any, scale_ub: Any = None,  # noqa: A002
    residual: Any = None, is_scale_transposed: bool = False,
) -> Any:  # fmt: skip
    assert (quant_dtype, group_size) == (FP8, [1, BLOCK])
    if residual is not None:
        residual += input
    return quantized(_normed(input if residual is None else residual, weight, epsilon))


def w8a8_triton_block_scaled_mm(
    A: Any, B: Any, As: Any, Bs: Any, block_size: Any, output_dtype: Any = torch.float16,  # noqa: N803
) -> Any:  # fmt: skip
    assert block_size == [BLOCK, BLOCK] and As.is_contiguous() and Bs.is_contiguous()
    return (spread(A, As) @ spread(B, Bs).T).to(output_dtype)


def cutlass_scaled_mm(a: Any, b: Any, scale_a: Any, scale_b: Any, out_dtype: Any, bias: Any = None) -> Any:
    assert a.is_contiguous() and b.T.is_contiguous() and scale_a.stride(0) == 1
    assert scale_b.shape == (b.shape[0] // BLOCK, b.shape[1] // BLOCK)
    return (spread(a, scale_a) @ spread(b.T, scale_b.T).T).to(out_dtype)


def grouped_topk(
    scores: Any, num_expert_group: int, topk_group: int, topk: int, renormalize: bool, routed_scaling_factor: float,
    bias: Any, scoring_func: int = 0,
) -> Any:  # fmt: skip
    assert scoring_func == 1 and renormalize
    own = scores.sigmoid()
    grouped = (own + bias).unflatten(1, (num_expert_group, -1))
    best = grouped.topk(2, -1).values.sum(-1).topk(topk_group, -1).indices
    closed = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter(1, best, False)
    ids = grouped.masked_fill(closed[..., None], float("-inf")).flatten(1).topk(topk, -1).indices.flip(1)
    weights = own.gather(1, ids)
    return weights / weights.sum(1, keepdim=True) * routed_scaling_factor, ids.int()


def silu_and_mul_per_block_quant(
    input: Any, group_size: int, quant_dtype: Any, scale_ub: Any = None, is_scale_transposed: bool = False,  # noqa: A002
) -> Any:  # fmt: skip
    assert (group_size, quant_dtype, input.dim()) == (BLOCK, FP8, 2)
    gate, up = input.float().chunk(2, -1)
    return quantized(torch.nn.functional.silu(gate) * up)


def fused_qk_norm_rope(
    qkv: Any, num_heads_q: int, num_heads_k: int, num_heads_v: int, head_dim: int, eps: float, q_weight: Any,
    k_weight: Any, cos_sin_cache: Any, is_neox: bool, position_ids: Any,
) -> None:  # fmt: skip
    assert is_neox and position_ids.dtype == torch.int64
    heads = qkv.unflatten(1, (-1, head_dim))
    assert heads.shape[1] == num_heads_q + num_heads_k + num_heads_v
    for own, weight in ((slice(num_heads_q), q_weight), (slice(num_heads_q, num_heads_q + num_heads_k), k_weight)):
        turned = _rotated(_normed(heads[:, own], weight, eps), cos_sin_cache[position_ids])
        heads[:, own] = turned.to(qkv.dtype)


def try_get_optimal_moe_config(
    w1_shape: Any, w2_shape: Any, top_k: int, dtype: Any, M: int, block_shape: Any = None,  # noqa: N803
) -> Any:  # fmt: skip
    assert (dtype, block_shape, w1_shape[1]) == ("fp8_w8a8", [BLOCK, BLOCK], 2 * w2_shape[2])
    return {"BLOCK_SIZE_M": 4}


def moe_align_block_size(topk_ids: Any, block_size: int, num_experts: int) -> Any:
    """Entries by expert, each expert's padded to a block with the number of entries."""
    order, experts = [], []
    for expert in range(num_experts):
        own = (topk_ids.flatten() == expert).nonzero().flatten().tolist()
        blocks = -(-len(own) // block_size)
        order += own + [topk_ids.numel()] * (blocks * block_size - len(own))
        experts += [expert] * blocks
    total = torch.tensor([len(order)], dtype=torch.int32)
    return torch.tensor(order + [topk_ids.numel()] * 7, dtype=torch.int32), torch.tensor(experts).int(), total


def invoke_fused_moe_triton_kernel(
    A: Any, B: Any, C: Any, A_scale: Any, B_scale: Any, topk_weights: Any, sorted_token_ids: Any,  # noqa: N803
    expert_ids: Any, num_tokens_post_padded: Any, mul_routed_weight: bool, top_k: int, config: Any,
    compute_type: Any, use_fp8_w8a8: bool, use_int8_w8a8: bool, use_int8_w8a16: bool, use_int4_w4a16: bool,
    per_channel_quant: bool, block_shape: Any = None,
) -> None:  # fmt: skip
    assert use_fp8_w8a8 and not (mul_routed_weight or use_int8_w8a8 or use_int8_w8a16 or use_int4_w4a16)
    assert block_shape == [BLOCK, BLOCK] and not per_channel_quant and C.dim() == 3
    block, rows, entries = config["BLOCK_SIZE_M"], C.view(-1, C.shape[-1]), len(A) * top_k
    assert len(rows) == entries
    for at, expert in enumerate(expert_ids.tolist()):
        if at * block >= int(num_tokens_post_padded):
            break
        whole = slice(at * block, (at + 1) * block)
        here = torch.tensor([at]) if sorted_token_ids is None else sorted_token_ids[whole].long()
        own = here[here < entries]
        x = spread(A[own // top_k], A_scale[own // top_k])
        rows[own] = (x @ spread(B[expert], B_scale[expert]).T).to(C.dtype)


def flash_attn_varlen_func(
    q: Any, k: Any, v: Any, max_seqlen_q: int, cu_seqlens_q: Any, max_seqlen_k: int, cu_seqlens_k: Any = None,
    seqused_k: Any = None, softmax_scale: Any = None, causal: bool = False, block_table: Any = None, out: Any = None,
    fa_version: int = 2,
) -> Any:  # fmt: skip
    assert causal and fa_version == 3 and k.stride(-1) == 1 and cu_seqlens_k is None
    starts, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
    assert max_seqlen_k == max(lengths) and max_seqlen_q == int(cu_seqlens_q.diff().max())
    for row, length in enumerate(lengths):
        pages = block_table[row, : -(-length // k.shape[1])].long()
        own = slice(starts[row], starts[row + 1])
        keys, values = (pool[pages].flatten(0, 1)[:length] for pool in (k, v))
        out[own] = _attend(q[own], keys, values, softmax_scale)
    return out


def _attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """q [t, Hq, D] at the end of keys and values [L, Hkv, D]."""
    see = torch.ones(len(q), len(keys), dtype=torch.bool).tril(len(keys) - len(q))
    heads = [x.float().transpose(0, 1)[None] for x in (q, keys, values)]
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(*heads, attn_mask=see, scale=scale, enable_gqa=True)[0].transpose(0, 1).to(q.dtype)


# FlashInfer


def rmsnorm(input: Any, weight: Any, eps: float = 1e-6, out: Any = None) -> Any:  # noqa: A002
    return out.copy_(_normed(input, weight, eps))


def fused_add_rmsnorm(input: Any, residual: Any, weight: Any, eps: float = 1e-6) -> None:  # noqa: A002
    fused_add_rms_norm(input, residual, weight, eps)


def apply_rope_with_cos_sin_cache_inplace(
    positions: Any, query: Any, key: Any, head_size: int, cos_sin_cache: Any, is_neox: bool = True
) -> None:
    assert is_neox and cos_sin_cache.dtype == torch.float32
    for flat in (query, key):
        heads = flat.unflatten(1, (-1, head_size))
        heads.copy_(_rotated(heads.float(), cos_sin_cache[positions.long()]).to(flat.dtype))


def _rotated(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D] with its first dims turned: pairs i, i + half."""
    half = cos_sin.shape[1] // 2
    cos, sin = (part[:, None].float() for part in cos_sin.split(half, 1))
    first, second = x[..., :half], x[..., half : 2 * half]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]), -1)


def fp8_blockscale_gemm_sm90(
    input: Any, weight: Any, input_scale: Any = None, weight_scale: Any = None, out: Any = None  # noqa: A002
) -> Any:  # fmt: skip
    # Its source hands the bare pointer to TMA: columns of a multiple of 4 rows.
    assert (input_scale.stride(0), input_scale.stride(1) % 4) == (1, 0) and input_scale.stride(1) >= len(input)
    return out.copy_(spread(input, input_scale) @ spread(weight, weight_scale).T)


class Wrapper:
    """Both of FlashInfer's wrappers of paged attention, for the layout HND."""

    def __init__(self, float_workspace_buffer: Any, kv_layout: str = "NHD") -> None:
        assert kv_layout == "HND" and float_workspace_buffer.numel() >= 128 * 2**20

    def prepare(self, starts: Any, pages: Any, sizes: Any, scale: float) -> None:
        """`pages` are indptr, indices and last_page_len."""
        assert all(part.dtype == torch.int32 for part in pages)
        self.starts, self.pages, self.sizes, self.scale = starts.tolist(), pages, sizes, scale

    def run(self, q: Any, paged_kv_cache: Any, out: Any = None) -> Any:
        indptr, indices, last = self.pages
        assert self.sizes == (q.shape[1], *paged_kv_cache.shape[2:3], q.shape[2], paged_kv_cache.shape[3])
        for row, used in enumerate(last.tolist()):
            pages = paged_kv_cache[indices[indptr[row] : indptr[row + 1]].long()]  # [n, 2, Hkv, page_size, D]
            length = max(0, (len(pages) - 1) * pages.shape[3] + used)
            keys, values = (pages[:, side].transpose(1, 2).flatten(0, 1)[:length] for side in (0, 1))
            own = slice(self.starts[row], self.starts[row + 1])
            out[own] = _attend(q[own], keys, values, self.scale)
        return out


class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
    """A token each."""

    def __init__(self, float_workspace_buffer: Any, kv_layout: str = "NHD", use_tensor_cores: bool = False) -> None:
        super().__init__(float_workspace_buffer, kv_layout)

    def plan(
        self, indptr: Any, indices: Any, last_page_len: Any, num_qo_heads: int, num_kv_heads: int, head_dim: int,
        page_size: int, *, q_data_type: Any, kv_data_type: Any, sm_scale: float,
    ) -> None:  # fmt: skip
        starts, sizes = torch.arange(len(indptr)), (num_qo_heads, num_kv_heads, head_dim, page_size)
        self.prepare(starts, (indptr, indices, last_page_len), sizes, sm_scale)


class BatchPrefillWithPagedKVCacheWrapper(Wrapper):
    """Several tokens each."""

    def plan(
        self, qo_indptr: Any, paged_kv_indptr: Any, paged_kv_indices: Any, paged_kv_last_page_len: Any,
        num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, *, causal: bool, q_data_type: Any,
        kv_data_type: Any, sm_scale: float,
    ) -> None:  # fmt: skip
        assert causal
        pages, sizes = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len), (num_qo_heads, num_kv_heads)
        self.prepare(qo_indptr, pages, (*sizes, head_dim_qk, page_size), sm_scale)


MOE = "vllm.model_executor.layers.fused_moe"
MODULES: dict[str, tuple[Any, ...]] = {
    "deep_gemm": (
        get_mn_major_tma_aligned_tensor, get_mk_alignment_for_contiguous_layout, fp8_gemm_nt,
        m_grouped_fp8_gemm_nt_masked, m_grouped_fp8_gemm_nt_contiguous,
    ),
    "vllm": (),
    "vllm._custom_ops": (
        rms_norm, fused_add_rms_norm, rms_norm_per_block_quant, cutlass_scaled_mm, grouped_topk,
        silu_and_mul_per_block_quant, fused_qk_norm_rope,
    ),
    f"{MOE}.fused_moe": (try_get_optimal_moe_config, moe_align_block_size, invoke_fused_moe_triton_kernel),
    "vllm.model_executor.layers.quantization.utils.fp8_utils": (w8a8_triton_block_scaled_mm,),
    "vllm.vllm_flash_attn": (flash_attn_varlen_func,),
    "flashinfer": (
        rmsnorm, fused_add_rmsnorm, apply_rope_with_cos_sin_cache_inplace, BatchDecodeWithPagedKVCacheWrapper,
        BatchPrefillWithPagedKVCacheWrapper,
    ),
    "flashinfer.gemm": (fp8_blockscale_gemm_sm90,),
}  # fmt: skip


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the stand-ins where `import_module` finds them."""
    for name, members in MODULES.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        for member in members:
            setattr(module, member.__name__, member)
        monkeypatch.setitem(sys.modules, name, module)
