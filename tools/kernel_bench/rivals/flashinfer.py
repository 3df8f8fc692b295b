"""FlashInfer's paged attention, norms, RoPE and FP8 matmul (github.com/flashinfer-ai/flashinfer).

Names and arguments as in `flashinfer-python` 0.7.2.post1. Its layout "HND" of a pool, [pages, 2, Hkv, page_size, D],
is ours, so attention reads the same memory.
"""

from importlib import import_module
from typing import Any

import torch

from angelforge.tools.kernel_bench.rivals.layouts import by_column, page_lists
from angelforge.tools.kernel_bench.rivals.rival import Engine, Rival, Shared, Tensors
from angelforge.tools.kernel_bench.work import Work

WORKSPACE = 2**28  # bytes; at least the 128 MB that its documentation asks for


def norm(flashinfer: Any, work: Work, i: Tensors, shared: Shared) -> Rival:
    """Norm."""
    y, epsilon = torch.empty_like(i["hidden"]), float(work.attributes["epsilon"])
    call = lambda: _drop(flashinfer.rmsnorm(i["hidden"], i["weight"], eps=epsilon, out=y))  # noqa: E731
    return Rival("rmsnorm", call, lambda: (y,))


def add_norm(flashinfer: Any, work: Work, i: Tensors, shared: Shared) -> Rival:
    """AddNorm; it changes both of its inputs, which are copies."""
    delta, total, epsilon = i["delta"].clone(), i["residual"].clone(), float(work.attributes["epsilon"])
    call = lambda: _drop(flashinfer.fused_add_rmsnorm(delta, total, i["weight"], eps=epsilon))  # noqa: E731
    return Rival("fused_add_rmsnorm", call, lambda: (total, delta))


def linear(flashinfer: Any, work: Work, i: Tensors, shared: Shared) -> Rival:
    """Fp8Linear. The kernel reads scales of x column by column, padded to 16 bytes, whatever strides a tensor has."""
    scale = by_column(i["x_scale"], 4)
    matmul = import_module(f"{flashinfer.__name__}.gemm").fp8_blockscale_gemm_sm90
    y = torch.empty((len(i["x"]), len(i["weight"])), dtype=torch.bfloat16, device=i["x"].device)
    call = lambda: _drop(matmul(i["x"], i["weight"], scale, i["weight_scale"], out=y))  # noqa: E731
    return Rival("fp8_blockscale_gemm_sm90", call, lambda: (y,))


def rotate(flashinfer: Any, work: Work, i: Tensors, shared: Shared) -> Rival:
    """QKVRotate without the write into the pool; it changes queries and keys, which are copies."""
    dim = work.dims["D"]
    widths = [int(work.attributes[name]) * dim for name in ("num_heads", "num_kv_heads")]
    parts = i["qkv"][:, : sum(widths)].split(widths, 1)
    query, key = (part.clone(memory_format=torch.contiguous_format) for part in parts)
    table = torch.cat((i["rope_cos"], i["rope_sin"]), 1)

    def call() -> None:
        flashinfer.apply_rope_with_cos_sin_cache_inplace(i["positions"], query, key, dim, table, is_neox=True)

    name = "apply_rope_with_cos_sin_cache_inplace"
    return Rival(name, call, lambda: (query.unflatten(1, (-1, dim)), None), "does not write into the pool")


def attention(flashinfer: Any, work: Work, i: Tensors, shared: Shared) -> Rival:
    """PagedAttention and AttentionMerge in one call."""
    query, pool = i["query"], i["kv_cache"]
    kv_heads, page_size = pool.shape[2:4]
    pages = page_lists(i["page_table"], i["kv_length"], page_size)
    workspace = shared.get("workspace", None, lambda: torch.zeros(WORKSPACE, dtype=torch.uint8, device=query.device))
    sizes = (query.shape[1], kv_heads, query.shape[2], page_size)
    options = {"q_data_type": query.dtype, "kv_data_type": pool.dtype, "sm_scale": float(work.attributes["scale"])}
    if len(i["kv_length"]) == len(query):  # a token each
        name = "BatchDecodeWithPagedKVCacheWrapper"
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(*pages, *sizes, **options)
    else:
        name = "BatchPrefillWithPagedKVCacheWrapper"
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        wrapper.plan(i["query_start"], *pages, *sizes, causal=True, **options)
    y = torch.empty_like(query)
    return Rival(name, lambda: _drop(wrapper.run(query, pool, out=y)), lambda: (y,), "joins its parts")


def _drop(result: Any) -> None:
    """What it returns is `out`."""


FLASHINFER = Engine(
    "FlashInfer",
    ("flashinfer",),
    {
        "Norm": (norm,),
        "AddNorm": (add_norm,),
        "Fp8Linear": (linear,),
        "QKVRotate": (rotate,),
        "PagedAttention": (attention,),
    },
)
