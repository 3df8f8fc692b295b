"""The configuration: what is read, what is refused, and that a saved one comes back."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from angelforge.config import ModelConfig, Quantization, RopeScaling
from angelforge.errors import AngelForgeError, UsageError
from angelforge.exporter.synthetic import FULL_CONFIG, small_config

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def full(drop: tuple[str, ...] = (), **changes: Any) -> ModelConfig:
    """AntAngelMed's configuration with changes."""
    return ModelConfig.from_dict({key: value for key, value in {**FULL_CONFIG, **changes}.items() if key not in drop})


def test_every_published_figure_is_read() -> None:
    """The table of the published model, key by key."""
    c = full()
    assert (c.hidden_size, c.num_hidden_layers, c.vocab_size) == (4096, 32, 157184)
    assert (c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rotary_dim) == (32, 4, 128, 64)
    assert (c.intermediate_size, c.first_k_dense_replace, c.moe_intermediate_size) == (9216, 1, 1024)
    assert (c.num_experts, c.num_experts_per_tok, c.num_shared_experts) == (256, 8, 1)
    assert (c.n_group, c.topk_group, c.routed_scaling_factor) == (8, 4, 2.5)
    assert (c.rope_theta, c.max_position_embeddings, c.rope_scaling, c.max_context) == (6e5, 32768, None, 32768)
    assert (c.rms_norm_eps, c.use_qk_norm, c.tie_word_embeddings, c.torch_dtype) == (1e-6, True, False, "bfloat16")
    assert (c.eos_token_ids, c.pad_token_id, c.bos_token_id, c.quantization, c.notes) == (
        (156892,),
        156891,
        None,
        None,
        (),
    )
    assert (c.qkv_size, c.num_expert_slots, c.experts_per_token, c.num_moe_layers) == (5120, 257, 9, 31)
    assert [c.is_moe_layer(i) for i in (0, 1, 31)] == [False, True, True]


@pytest.mark.parametrize("model_type", ["bailing_moe", "bailing_moe_v2"])
def test_both_model_types(model_type: str) -> None:
    """Both spellings of the model type are the same model."""
    assert full(model_type=model_type) == full()


def test_absent_keys_have_the_meaning_of_the_published_code() -> None:
    """head_dim is hidden / heads, groups are one, no shared expert, no dense layer; the group default is told."""
    c = full(drop=("head_dim", "n_group", "topk_group", "num_shared_experts", "first_k_dense_replace", "use_qk_norm"))
    assert (c.head_dim, c.n_group, c.topk_group, c.num_shared_experts, c.first_k_dense_replace) == (128, 1, 1, 0, 0)
    assert c.use_qk_norm
    assert "n_group" in c.notes[0]


@pytest.mark.parametrize(
    ("changes", "drop"),
    [
        ({"rotary_dim": 64}, ("partial_rotary_factor",)),
        ({"rotary_dim": 64}, ()),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ("partial_rotary_factor",)),
        ({"rope_parameters": {"rope_theta": 600000.0, "rope_type": "default"}}, ("rope_theta", "rope_scaling")),
        ({"rope_parameters": {"rope_theta": 600000, "rope_type": "default"}}, ()),
        ({"rope_scaling": {"type": "default"}}, ()),
        ({"dtype": "bfloat16"}, ("torch_dtype",)),
        ({"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}, ()),
        ({"moe_shared_expert_intermediate_size": 1024, "use_rmsnorm": True, "router_dtype": "fp32"}, ()),
        ({"attention_dropout": 0.1, "layer_types": ["full_attention"] * 32, "attention_bias": None}, ()),
        ({"output_scores": True, "num_beam_groups": 1, "_name_or_path": "x", "auto_map": {"AutoConfig": "x"}}, ()),
    ],
)
def test_spellings_of_the_same_model(changes: dict[str, Any], drop: tuple[str, ...]) -> None:
    """Old and new spellings, and keys that change nothing, all give the same configuration."""
    assert full(drop, **changes) == full()


@pytest.mark.parametrize("block", [YARN, {**YARN, "rope_type": "yarn"}, {**YARN, "beta_fast": 32, "beta_slow": 1}])
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_yarn(block: dict[str, Any], place: str) -> None:
    """YaRN is read from either place; its factor counts whatever max_position_embeddings says (32768 is left there)."""
    c = full(**{place: block})
    assert c.rope_scaling is not None
    assert c.rope_scaling.attention_factor == pytest.approx(1.138629, abs=1e-6)
    assert (c.rope_scaling.factor, c.max_context, c.notes) == (4.0, 131072, ())
    assert full(**{place: block}, max_position_embeddings=131072).rope_scaling == c.rope_scaling


def test_an_explicit_attention_factor_is_honoured() -> None:
    """What the configuration states wins over the formula."""
    scaling = full(rope_scaling={**YARN, "attention_factor": 1.25}).rope_scaling
    assert scaling is not None
    assert scaling.attention_factor == 1.25


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama"}, "model_type"),
    ({"architectures": ["BailingMoeForCausalLM"]}, "architectures"),
    ({"hidden_size": "4096"}, "hidden_size"),
    ({"hidden_size": 4096.0}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
    ({"num_experts": 0}, "num_experts"),
    ({"num_experts": 250}, "n_group"),
    ({"n_group": 256}, "n_group"),
    ({"topk_group": 9}, "topk_group"),
    ({"num_experts_per_tok": 129}, "num_experts_per_tok"),
    ({"num_key_value_heads": 5}, "num_key_value_heads"),
    ({"first_k_dense_replace": 33}, "first_k_dense_replace"),
    ({"first_k_dense_replace": -1}, "first_k_dense_replace"),
    ({"head_dim": None, "num_attention_heads": 36}, "head_dim"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    ({"routed_scaling_factor": None}, "routed_scaling_factor"),
    ({"rope_theta": None}, "rope_theta"),
    ({"rope_theta": 1.0}, "rope_theta"),
    ({"rope_theta": 10**400}, "rope_theta"),
    ({"rotary_dim": 32}, "rotary_dim"),
    ({"partial_rotary_factor": None}, "partial_rotary_factor"),
    ({"partial_rotary_factor": None, "rotary_dim": 63}, "rotary_dim"),
    ({"partial_rotary_factor": 1.5}, "rotary_dim"),
    ({"rope_parameters": {"rope_theta": 10000.0}}, "rope_theta"),
    ({"rope_parameters": {"partial_rotary_factor": 1.0}}, "partial_rotary_factor"),
    ({"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 2.0}}, "rope_parameters"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "llama3"),
    ({"rope_scaling": {"factor": 4.0}}, "rope_type"),
    ({"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 4.0}}, "rope_type and type differ"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
    ({"rope_scaling": {**YARN, "factor": 0.5}}, "factor"),
    ({"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}, "mscale_all_dim"),
    ({"rope_scaling": {**YARN, "truncate": False}}, "truncate"),
    ({"rope_scaling": {**YARN, "beta_fast": 1}}, "beta_fast"),
    ({"rope_scaling": {**YARN, "attention_factor": -1.0}}, "attention_factor"),
    ({"rope_scaling": {**YARN, "long_factor": [1.0]}}, "long_factor"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"rope_scaling": YARN, "max_position_embeddings": 262144}, "max_position_embeddings"),
    ({"moe_shared_expert_intermediate_size": 2048}, "moe_shared_expert_intermediate_size"),
    ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype"),
    ({"eos_token_id": "x"}, "eos_token_id"),
    ({"eos_token_id": [1, None]}, "eos_token_id"),
    ({"pad_token_id": [1]}, "pad_token_id"),
    ({"use_qk_norm": 1}, "use_qk_norm"),
    ({"quantization_config": {**FP8, "quant_method": "awq"}}, "quant_method"),
    ({"quantization_config": {**FP8, "fmt": "e5m2"}}, "fmt"),
    ({"quantization_config": {**FP8, "activation_scheme": "static"}}, "activation_scheme"),
    ({"quantization_config": {**FP8, "weight_block_size": [64, 128]}}, "weight_block_size"),
    ({"quantization_config": {**FP8, "weight_block_size": None}}, "weight_block_size"),
    ({"quantization_config": {**FP8, "scale_fmt": "ue8m0"}}, "scale_fmt"),
    ({"quantization_config": "fp8"}, "quantization_config"),
    # Keys that change the mathematics, known ones and any of a telling name.
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"use_bias": True}, "use_bias"),
    ({"use_qkv_bias": True}, "use_qkv_bias"),
    ({"use_bias": 1}, "use_bias"),
    ({"score_function": "softmax"}, "score_function"),
    ({"norm_topk_prob": False}, "norm_topk_prob"),
    ({"moe_router_enable_expert_bias": False}, "moe_router_enable_expert_bias"),
    ({"router_dtype": "bf16"}, "router_dtype"),
    ({"sliding_window": 4096}, "sliding_window"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["linear_attention"]}, "layer_types"),
    ({"rope_interleave": True}, "rope_interleave"),
    ({"layer_group_size": 5}, "layer_group_size"),
    ({"kv_lora_rank": 512}, "kv_lora_rank"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({"embedding_multiplier": 12}, "embedding_multiplier"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED, ids=[f"{i}-{named}" for i, (_, named) in enumerate(REFUSED)])
def test_wrong_or_unsupported_keys_are_named(changes: dict[str, Any], named: str) -> None:
    """Nothing that changes the mathematics is ignored: the error names the key."""
    with pytest.raises(AngelForgeError, match=named):
        full(**changes)


@pytest.mark.parametrize(
    "key", [key for key in FULL_CONFIG if key in {f.name for f in dataclasses.fields(ModelConfig)}]
)
def test_no_value_of_a_wrong_type_passes(key: str) -> None:
    """An object in place of any value is an error that names the key (a null may mean absent)."""
    with pytest.raises(AngelForgeError, match=key):
        full(**{key: {"a": 1}})


def test_all_unsupported_keys_in_one_message() -> None:
    """Several contradictions are told at once."""
    with pytest.raises(AngelForgeError, match=r"use_bias.*score_function.*use_alibi_scaling"):
        full(use_bias=True, score_function="softmax", use_alibi_scaling=True)


def test_one_expert_per_token_needs_no_normalisation() -> None:
    """The published code skips it then, so the key may say false."""
    assert full(num_experts_per_tok=1, norm_topk_prob=False).num_experts_per_tok == 1


def test_unknown_harmless_keys_are_told() -> None:
    """A key of no telling name, or one that is switched off, is a note at most."""
    notes = full(favourite_colour="blue", use_flash_attention=False, some_window=None).notes
    assert notes == ("Ignored keys that AngelForge does not know: favourite_colour, use_flash_attention.",)


def test_dropped_mtp_layers_are_told() -> None:
    """A base model's prediction layers change nothing in its own output, but are not kept silently."""
    assert "num_nextn_predict_layers is 1" in full(num_nextn_predict_layers=1).notes[0]


def test_fp8_block_format_is_read() -> None:
    """With or without the fmt that Transformers leaves out."""
    for block in (FP8, {key: value for key, value in FP8.items() if key != "fmt"}):
        assert full(quantization_config={**block, "modules_to_not_convert": None}).quantization == Quantization()


@pytest.mark.parametrize(
    ("eos", "generation", "expected"),
    [
        (5, {"eos_token_id": [5, 9]}, (5, 9)),
        ([7, 5], {"eos_token_id": 9}, (7, 5, 9)),
        (None, {"eos_token_id": 9}, (9,)),
        (5, {}, (5,)),
        (5, None, (5,)),
    ],
)
def test_eos_ids_of_both_files_are_merged(eos: Any, generation: dict[str, Any] | None, expected: object) -> None:
    """An id is kept once, in order of appearance."""
    raw = {**FULL_CONFIG, "eos_token_id": eos}
    assert ModelConfig.from_dict(raw, generation).eos_token_ids == expected


def test_special_tokens_outside_the_vocabulary_are_dropped_and_told() -> None:
    """They can never be produced; a model without any eos says so."""
    c = full(eos_token_id=157184, pad_token_id=-1)
    assert (c.eos_token_ids, c.pad_token_id) == ((), None)
    assert "157184" in c.notes[0]
    assert "No eos_token_id" in c.notes[1]


def test_with_layers() -> None:
    """The first n layers; a note says so; dense layers are cut with them."""
    cut = full().with_layers(4)
    assert (cut.num_hidden_layers, cut.first_k_dense_replace, "first 4 of 32" in cut.notes[0]) == (4, 1, True)
    assert full(first_k_dense_replace=3).with_layers(2).num_moe_layers == 0
    assert full().with_layers(32) == full()
    for wrong in (0, 33, -1):
        with pytest.raises(UsageError, match="32"):
            full().with_layers(wrong)


def test_with_rope_scaling() -> None:
    """Stretching is the same as YaRN in the configuration, and says that short prompts change too."""
    stretched = full().with_rope_scaling("yarn:4")
    assert stretched.rope_scaling == full(rope_scaling=YARN).rope_scaling
    assert stretched.max_context == 131072
    assert "short prompts" in stretched.notes[0]
    assert "1.138629" in stretched.notes[0]
    with pytest.raises(UsageError, match="already has YaRN"):
        stretched.with_rope_scaling("yarn:2")


@pytest.mark.parametrize("request_", ["yarn", "yarn:", "yarn:x", "yarn:1", "yarn:-4", "yarn:nan", "linear:4", "", "4"])
def test_malformed_rope_scaling_is_wrong_use(request_: str) -> None:
    """The message shows the form that is needed."""
    with pytest.raises(UsageError, match="yarn:4"):
        full().with_rope_scaling(request_)


def configs() -> st.SearchStrategy[ModelConfig]:
    """Consistent configurations of many sizes."""

    def build(heads: int, group: int, dim: int, experts: int, layers: int, yarn: bool, fp8: bool) -> ModelConfig:
        raw = small_config(num_attention_heads=heads * group, num_key_value_heads=heads, head_dim=2 * dim)
        raw |= {"num_experts": 8 * experts, "num_hidden_layers": layers, "first_k_dense_replace": layers // 2}
        raw |= {"rope_scaling": YARN if yarn else None, "quantization_config": FP8 if fp8 else None}
        return ModelConfig.from_dict({**raw, "partial_rotary_factor": 1.0})

    small = st.integers(1, 8)
    return st.builds(build, small, small, small, small, small, st.booleans(), st.booleans())


@given(configs())
def test_a_saved_configuration_comes_back(config: ModelConfig) -> None:
    """to_dict, through JSON, and from_saved: the same configuration with the same digest."""
    again = ModelConfig.from_saved(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.digest() == config.digest()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([1e308, 2**70, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*YARN, *FP8, "a"]), inner, max_size=3),
    max_leaves=6,
)
KEYS = [*FULL_CONFIG, "rotary_dim", "rope_parameters", "quantization_config", "sliding_window", "dtype", "unknown"]


@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3), JSON)
def test_any_json_gives_a_configuration_or_a_message(changes: dict[str, Any], generation: Any) -> None:
    """Never another kind of error, whatever a file holds."""
    raw = {**FULL_CONFIG, **changes}
    try:
        config = ModelConfig.from_dict(
            raw, generation if isinstance(generation, dict) else {"eos_token_id": generation}
        )
    except AngelForgeError as error:
        assert str(error)
    else:
        assert ModelConfig.from_saved(config.to_dict()) == config


def test_the_digest_is_that_of_the_model() -> None:
    """Any field but the notes changes it."""
    config = full()
    assert dataclasses.replace(config, notes=("x",)).digest() == config.digest()
    assert dataclasses.replace(config, rms_norm_eps=1e-5).digest() != config.digest()
    assert config.with_rope_scaling("yarn:4").digest() != config.digest()


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved.pop("hidden_size"),
        lambda saved: saved.update(hidden_size="4096"),
        lambda saved: saved.update(unknown=1),
        lambda saved: saved.update(rope_scaling={"factor": 4.0}),
        lambda saved: saved.update(eos_token_ids=[True]),
        lambda saved: saved.update(quantization={"fmt": "e4m3", "block": [64, 64]}),
        lambda saved: saved.update(n_group=3),
    ],
)
def test_a_damaged_saved_configuration_is_refused(damage: Callable[[dict[str, Any]], object]) -> None:
    """Anything that to_dict does not write."""
    saved = full().to_dict()
    damage(saved)
    with pytest.raises(AngelForgeError):
        ModelConfig.from_saved(saved)


def test_load_reads_the_generation_config_beside_it(tmp_path: Path) -> None:
    """From the folder or from the file."""
    (tmp_path / "config.json").write_text(json.dumps(FULL_CONFIG))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [156892, 156895]}')
    assert ModelConfig.load(tmp_path).eos_token_ids == (156892, 156895)
    assert ModelConfig.load(str(tmp_path / "config.json")) == ModelConfig.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "JSON object"),
        (b'{"rms_norm_eps": NaN}', "NaN"),
        (b'{"rms_norm_eps": -Infinity}', "-Infinity"),
        (b'{"hidden_size": 1, "hidden_size": 2}', "hidden_size"),
        (b"\xff\xfe\xfa", "cannot be read"),
        (b'{"a": ' + b"[" * 200_000, "cannot be read"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read"),
    ],
)
def test_unreadable_json_is_told(tmp_path: Path, text: bytes, told: str) -> None:
    """The message names the file and what is wrong with it."""
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(AngelForgeError, match=told) as error:
        ModelConfig.load(tmp_path)
    assert "config.json" in str(error.value)


def test_absent_and_huge_files_are_told(tmp_path: Path) -> None:
    """No config.json; a weight file in its place (sparse: nothing of it is read)."""
    with pytest.raises(AngelForgeError, match=r"config\.json"):
        ModelConfig.load(tmp_path)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(5_000_000_000)
    with pytest.raises(AngelForgeError, match="5000000000 bytes"):
        ModelConfig.load(tmp_path / "model.safetensors")


def test_rope_scaling_positions() -> None:
    """Factor times trained length."""
    assert RopeScaling(2.5, 32768, 1.0).positions == 81920
