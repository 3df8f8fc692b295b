"""Random weights have the graph's names, types and shapes, a trained model's scale, and spread tokens over experts."""

import numpy as np
import pytest
import torch

from angelforge.config import ModelConfig
from angelforge.engines.decode_limit import touched_experts
from angelforge.engines.footprint import weight_bytes
from angelforge.exporter.graph import build_graph
from angelforge.exporter.layout import bundle_tensors
from angelforge.exporter.synthetic_config import FULL_CONFIG, small_config
from angelforge.plugins import run_kernel
from angelforge.plugins.kernel import Gpu
from angelforge.plugins.run_kernel import ONNX_TYPES
from angelforge.precision import Precision
from angelforge.tools.device_step import weights as module
from angelforge.tools.device_step.executor import StepGraph
from angelforge.tools.device_step.memory import PAGE_SIZE
from angelforge.tools.device_step.sequences import Case, decode_batch, on_device
from angelforge.tools.device_step.weights import empty_weights, fill_weights, nbytes

FULL = ModelConfig.from_dict(FULL_CONFIG)
SMALL = ModelConfig.from_dict(small_config()).with_layers(2)
CONTEXT = 131072


@pytest.mark.parametrize("precision", [Precision.FP8, Precision.BF16])
def test_every_weight_of_the_real_model(precision: Precision) -> None:
    """What a bundle of AntAngelMed would hold, tensor by tensor, and the planner's bytes; no memory is taken."""
    weights = empty_weights(build_graph(FULL, precision, PAGE_SIZE, CONTEXT), "meta")
    expected = {t.name: (t.dtype.onnx, t.shape) for t in bundle_tensors(FULL, precision, CONTEXT)}
    assert {name: (ONNX_TYPES[w.dtype], tuple(w.shape)) for name, w in weights.items()} == expected
    assert nbytes(weights) == sum(item.total for item in weight_bytes(FULL, precision, CONTEXT))


def test_values_are_of_a_trained_models_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in pieces that end within a tensor; FP8 finite, scales positive, norms near 1, rope rows on the circle."""
    monkeypatch.setattr(module, "PIECE", 100_000)
    weights = empty_weights(build_graph(SMALL, Precision.FP8, PAGE_SIZE, 200), "cpu")
    for weight in weights.values():
        weight.view(torch.uint8).fill_(0xFF)  # NaN, or −1: what is left unwritten shows
    fill_weights(weights, SMALL.rope_theta, seed=3)
    for name, weight in weights.items():
        values = weight.float()
        assert values.isfinite().all(), name
        if name.endswith("_scale_inv"):
            assert values.min() > 0
            product = weights[name.removesuffix("_scale_inv")].float().std() * values.mean()
            assert 0.7 < product * weights[name.removesuffix("_scale_inv")].shape[-1] ** 0.5 < 1.3
        elif weight.dim() == 1 and not name.endswith("expert_bias"):
            assert (values - 1).abs().max() < 0.7
    circle = weights["rope.cos"].double() ** 2 + weights["rope.sin"].double() ** 2
    assert torch.allclose(circle, torch.ones_like(circle), atol=1e-6)
    assert weights["rope.sin"][1, 0] == pytest.approx(np.sin(1.0))
    again = empty_weights(build_graph(SMALL, Precision.FP8, PAGE_SIZE, 200), "cpu")
    fill_weights(again, SMALL.rope_theta, seed=3)
    assert all(torch.equal(again[n].view(torch.uint8), w.view(torch.uint8)) for n, w in weights.items())


def test_tokens_spread_over_the_experts_of_the_real_router() -> None:
    """32 random tokens reach as many of 256 experts as if each chose freely, which the physical limit assumes."""
    from angelforge.plugins.registry import OPERATORS
    from angelforge.tools.kernel_bench.truth import by_body
    from angelforge.tools.kernel_bench.work import Work

    gate = {"model.layers.1.mlp.gate.weight": torch.empty(256, 4096), "expert_bias": torch.empty(256)}
    fill_weights(gate, FULL.rope_theta, seed=5)
    hidden = torch.randn(640, 4096, generator=torch.Generator().manual_seed(6))
    logits = hidden @ gate["model.layers.1.mlp.gate.weight"].T
    options = {"top_k": 8, "n_group": 8, "topk_group": 4, "num_shared_experts": 1, "routed_scaling_factor": 2.5}
    count = torch.tensor([640], dtype=torch.int32)
    work = Work(OPERATORS["MoERoute"], "", {}, options)
    ids = by_body(work, [logits, gate["expert_bias"], count])[0][:, :8]
    found = np.mean([len(set(ids[start : start + 32].flatten().tolist())) for start in range(0, 640, 32)])
    assert found == pytest.approx(touched_experts(FULL, 32), rel=0.04)  # 163
    assert torch.bincount(ids.flatten().long(), minlength=256).min() > 0


@pytest.mark.parametrize("case", [Case(1, 131072), Case(32, 1024)], ids=str)
def test_the_real_step_can_be_launched(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node of all 32 layers finds its kernel, tile and outputs for the real sizes; nothing is computed."""
    launched = []
    monkeypatch.setattr(run_kernel, "launch", lambda kernel, *_: launched.append(kernel.operator.name))
    graph = build_graph(FULL, Precision.FP8, PAGE_SIZE, CONTEXT)
    step = StepGraph(graph, Gpu("sm_90", 132))
    shape = (case.pages(PAGE_SIZE), 2, FULL.num_key_value_heads, PAGE_SIZE, FULL.head_dim)
    pools = {f"kv_cache.{i}": torch.empty(shape, dtype=torch.bfloat16, device="meta") for i in range(32)}
    inputs = {n: v.to("meta") for n, v in on_device(decode_batch(FULL, case, PAGE_SIZE, 1), "cpu").items()}
    logits = step.run({**empty_weights(graph, "meta"), **pools, **inputs})
    assert (tuple(logits.shape), logits.dtype) == ((case.batch, FULL.vocab_size), torch.float32)
    assert len(launched) == step.launches - 2  # two Gathers are torch's
    assert step.launches_by_layer == [9, *[12] * 31]
    assert launched.count("Fp8MoEGateUp") == 31
