"""The inventory of a checkpoint's tensors, against the published counts and bytes."""

import math

import pytest

from angelforge.config import ModelConfig
from angelforge.dtypes import DType
from angelforge.exporter.synthetic import FULL_CONFIG, small_config
from angelforge.inventory import expected_tensors, is_dropped

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("extra", "count", "gigabytes"), [({}, 24161, 205.8), ({"quantization_config": FP8}, 48129, 104.2)]
)
def test_published_count_and_size(extra: dict[str, object], count: int, gigabytes: float) -> None:
    """24,161 tensors and 205.8 GB in BF16, 48,129 and 104.2 GB in FP8."""
    expected = expected_tensors(ModelConfig.from_dict({**FULL_CONFIG, **extra}))
    assert len(expected) == count

    def size(dtypes: frozenset[DType]) -> int:
        return next(iter(dtypes)).itemsize if len(dtypes) == 1 else DType.BF16.itemsize

    total = sum(math.prod(item.shape) * size(item.dtypes) for item in expected.values())
    assert round(total / 1e9, 1) == gigabytes


def test_published_shapes() -> None:
    """The table of the published checkpoint."""
    expected = expected_tensors(ModelConfig.from_dict(FULL_CONFIG))
    shapes = {
        "model.word_embeddings.weight": (157184, 4096),
        "lm_head.weight": (157184, 4096),
        "model.norm.weight": (4096,),
        "model.layers.31.input_layernorm.weight": (4096,),
        "model.layers.0.post_attention_layernorm.weight": (4096,),
        "model.layers.7.attention.query_key_value.weight": (5120, 4096),
        "model.layers.7.attention.dense.weight": (4096, 4096),
        "model.layers.7.attention.query_layernorm.weight": (128,),
        "model.layers.7.attention.key_layernorm.weight": (128,),
        "model.layers.0.mlp.gate_proj.weight": (9216, 4096),
        "model.layers.0.mlp.down_proj.weight": (4096, 9216),
        "model.layers.1.mlp.gate.weight": (256, 4096),
        "model.layers.31.mlp.gate.expert_bias": (256,),
        "model.layers.1.mlp.experts.255.up_proj.weight": (1024, 4096),
        "model.layers.1.mlp.experts.0.down_proj.weight": (4096, 1024),
        "model.layers.1.mlp.shared_experts.gate_proj.weight": (1024, 4096),
    }
    assert {name: expected[name].shape for name in shapes} == shapes
    assert "model.layers.0.mlp.gate.weight" not in expected
    assert "model.layers.1.mlp.gate_proj.weight" not in expected


def test_fp8_scales_cover_partial_blocks_and_only_quantised_weights() -> None:
    """One f32 scale for each 128×128 block, rounded up; embeddings, head, router and norms have none."""
    config = ModelConfig.from_dict(small_config(quantization_config=FP8, hidden_size=200, moe_intermediate_size=130))
    expected = expected_tensors(config)
    name = "model.layers.1.mlp.experts.3.gate_proj.weight"
    assert expected[name].dtypes == {DType.F8_E4M3}
    assert (expected[name + "_scale_inv"].shape, expected[name + "_scale_inv"].dtypes) == ((2, 2), {DType.F32})
    plain = ("word_embeddings", "lm_head", "norm", "mlp.gate.weight", "expert_bias")
    for name, item in expected.items():
        if any(part in name for part in plain):
            assert DType.F8_E4M3 not in item.dtypes
            assert name + "_scale_inv" not in expected
        elif not name.endswith("_scale_inv"):
            assert name + "_scale_inv" in expected


def test_options_of_the_architecture() -> None:
    """No QK norm, a tied head, no shared expert, several shared experts, several dense layers."""

    def names(**changes: object) -> set[str]:
        return set(expected_tensors(ModelConfig.from_dict(small_config(**changes))))

    assert not [name for name in names(use_qk_norm=False) if "query_layernorm" in name or "key_layernorm" in name]
    assert "lm_head.weight" not in names(tie_word_embeddings=True)
    assert not [name for name in names(num_shared_experts=0) if "shared" in name]
    assert "model.layers.1.mlp.gate_proj.weight" in names(first_k_dense_replace=2)
    two = expected_tensors(ModelConfig.from_dict(small_config(num_shared_experts=2)))
    assert two["model.layers.1.mlp.shared_experts.down_proj.weight"].shape == (256, 256)


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("model.layers.4.eh_proj.weight", True),
        ("model.layers.40.mlp.gate.weight", True),
        ("model.layers.3.mlp.gate.weight", False),
        ("model.layers.03x.weight", False),
        ("model.layers.", False),
        ("model.layers.x.weight", False),
        ("model.layers." + "9" * 5000 + ".weight", False),
        ("other.layers.9.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_layers_past_the_last_are_dropped_by_name(name: str, dropped: bool) -> None:
    """Prediction layers of a base model, or what --layers cuts off; nothing else."""
    assert is_dropped(name, ModelConfig.from_dict(small_config())) is dropped


def test_a_tied_head_may_be_present() -> None:
    """Some writers keep it; the embedding is used."""
    assert is_dropped("lm_head.weight", ModelConfig.from_dict(small_config(tie_word_embeddings=True)))
