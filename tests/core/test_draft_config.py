"""A draft's configuration: what is read, what is refused, and that a saved one comes back."""

from typing import Any

import pytest

from angelforge.config import ModelConfig
from angelforge.draft_config import DraftConfig
from angelforge.errors import AngelForgeError
from angelforge.exporter.synthetic import FULL_CONFIG, small_config
from angelforge.exporter.synthetic_draft import FULL_DRAFT_CONFIG, small_draft_config

TARGET = ModelConfig.from_dict(FULL_CONFIG)
SMALL = small_config()


def full(**changes: Any) -> DraftConfig:
    """The published draft's configuration with changes."""
    return DraftConfig.from_dict({**FULL_DRAFT_CONFIG, **changes}, TARGET)


def named(*layers: Any, **more: Any) -> dict[str, Any]:
    """An eagle_config that names layers."""
    return {"eagle_config": {"eagle_aux_hidden_state_layer_ids": list(layers), **more}}


def test_every_published_figure_is_read() -> None:
    """Also what is absent: Llama's defaults, layers 1, N/2 − 1 and N − 4; ids beyond the vocabulary do no harm."""
    d = full()
    assert (d.hidden_size, d.intermediate_size, d.head_dim) == (4096, 14336, 128)
    assert (d.num_attention_heads, d.num_key_value_heads, d.qkv_size) == (32, 8, 6144)
    assert (d.vocab_size, d.draft_vocab_size) == (157184, 32000)
    assert (d.rms_norm_eps, d.rope_theta) == (1e-5, 10000.0)
    assert (d.capture_layers, d.captured_size) == ((1, 15, 28), 12288)
    assert (d.fc_norm, d.norm_output, d.torch_dtype, d.notes) == (False, False, "bfloat16", ())


def test_keys_of_newer_drafts() -> None:
    d = full(fc_norm=True, norm_output=True, target_hidden_size=4096, **named(3, 0, use_aux_hidden_state=True))
    assert (d.fc_norm, d.norm_output, d.capture_layers, d.captured_size) == (True, True, (3, 0), 8192)
    assert full(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rope_theta=None).rope_theta == 5e5


def test_a_short_training_is_told() -> None:
    assert "2048 positions" in full(max_position_embeddings=2048).notes[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
        ({"model_type": "qwen3"}, "model_type"),
        ({"num_hidden_layers": 2}, "num_hidden_layers"),
        ({"hidden_size": 2048}, "hidden_size is 2048, but the target has 4096"),
        ({"target_hidden_size": 5120}, "target_hidden_size is 5120, but the target has 4096"),
        ({"vocab_size": 32000}, "vocab_size is 32000, but the target has 157184"),
        ({"draft_vocab_size": 200000}, "draft_vocab_size 200000 must be at most"),
        ({"draft_vocab_size": 0}, "draft_vocab_size is 0"),
        ({"num_key_value_heads": 5}, "num_attention_heads 32 must be a multiple of num_key_value_heads 5"),
        ({"head_dim": 33}, "head_dim 33 must be even"),
        ({"num_attention_heads": 24, "num_key_value_heads": 8}, "head_dim"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}}, "rope_scaling"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"norm_before_fc": True}, "norm_before_fc"),
        ({"fc_norm": "yes"}, "fc_norm"),
        (named(1, 1, 2), "[1, 1, 2], but distinct layers from 0 to 31"),
        (named(1, 32), "distinct layers from 0 to 31 are needed: the target has 32 layers"),
        (named(-1), "distinct layers"),
        (named(), "list of layers"),
        (named(1, "2"), "list of layers"),
        (named(1, 2, use_aux_hidden_state=False), "use_aux_hidden_state"),
        (named(1, 2, norm_before_residual=True), "norm_before_residual"),
    ],
)
def test_what_is_refused_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(AngelForgeError) as caught:
        full(**changes)
    assert said in str(caught.value)


def test_small_targets_must_have_their_layers_named() -> None:
    """The rule for the usual layers repeats itself on a target of 4 layers; the message says what to do."""
    config = small_draft_config(SMALL)
    del config["eagle_config"]
    with pytest.raises(AngelForgeError, match=r"1, 1, 0.*Name them in eagle_config\.eagle_aux"):
        DraftConfig.from_dict(config, ModelConfig.from_dict(SMALL))


def test_a_saved_configuration_comes_back() -> None:
    for d in (full(), full(fc_norm=True, max_position_embeddings=7, **named(2, 1))):
        assert DraftConfig.from_saved(d.to_dict()) == d
        assert DraftConfig.from_saved({**d.to_dict(), "notes": []}).digest() == d.digest()


def test_digests_differ_with_the_shape() -> None:
    assert len({full().digest(), full(norm_output=True).digest(), full(**named(1, 2, 3)).digest()}) == 3


@pytest.mark.parametrize("wrong", [{"notes": None}, {"capture_layers": [1, "2"]}, {"head_dim": "8"}, {"more": 1}])
def test_a_damaged_saved_configuration_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(AngelForgeError):
        DraftConfig.from_saved({**full().to_dict(), **wrong})


def test_a_draft_knows_its_target() -> None:
    full().require_target(TARGET)
    with pytest.raises(AngelForgeError, match="captures layer 15, but its target has 8"):
        full().require_target(TARGET.with_layers(8))
    with pytest.raises(AngelForgeError, match="hidden_size 4096, but its target has 256"):
        full().require_target(ModelConfig.from_dict(SMALL))
