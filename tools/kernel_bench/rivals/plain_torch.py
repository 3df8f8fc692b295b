"""Plain torch beside a kernel, where one call of it does nearly the same; FP8 matmuls stand beside bf16 ones."""

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from angelforge.tools.kernel_bench.work import Work

Call = Callable[[], None]


def rival(work: Work, inputs: Mapping[str, torch.Tensor]) -> tuple[str, Call] | None:
    """(what it is, a call on torch's current stream) on the same inputs, widened to bf16 where they are FP8."""
    name = work.operator.name
    if name in ("Linear", "Fp8Linear"):
        return _linear(inputs)
    if name == "Norm":
        x, weight = inputs["hidden"], inputs["weight"]
        return "rms_norm", lambda: _drop(functional.rms_norm(x, weight.shape, weight, 1e-6))
    if name == "Embedding":
        ids, table = inputs["input_ids"], inputs["table"]
        return "embedding", lambda: _drop(functional.embedding(ids, table))
    if name == "MoELogits":
        wide, weight = inputs["hidden"].float(), inputs["weight"]
        return "linear f32", lambda: _drop(functional.linear(wide, weight))
    if name == "PagedAttention" and work.sequences is not None and len(work.sequences.items) == 1:
        return _attention(work, inputs["query"], inputs["kv_cache"])
    return None


def _linear(inputs: Mapping[str, torch.Tensor]) -> tuple[str, Call]:
    x, weight = inputs["x"].bfloat16(), inputs["weight"].bfloat16()
    return "linear bf16", lambda: _drop(functional.linear(x, weight))


def _attention(work: Work, query: torch.Tensor, pool: torch.Tensor) -> tuple[str, Call]:
    """Over the same number of keys in contiguous memory; whole prompts are causal, single tokens see everything."""
    assert work.sequences is not None
    length, causal = work.sequences.lengths[0], work.tokens > 1
    size = (1, pool.shape[2], length, pool.shape[4])
    key, value = torch.randn(size, dtype=pool.dtype, device=pool.device), torch.randn(size, device=pool.device)
    value, q = value.to(pool.dtype), query.transpose(0, 1)[None].contiguous()
    attend = functional.scaled_dot_product_attention
    return "sdpa", lambda: _drop(attend(q, key, value, is_causal=causal, enable_gqa=True))


def _drop(result: torch.Tensor) -> None:
    """The result's memory goes back to torch."""
