"""Reads `config.json` and `generation_config.json` of a checkpoint into the fields of `ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from angelforge.config_json import Section
from angelforge.config_keys import check_other_keys
from angelforge.config_quantization import read_quantization
from angelforge.config_rope import Rope, read_rope
from angelforge.errors import AngelForgeError

MODEL_TYPES = ("bailing_moe", "bailing_moe_v2")
ARCHITECTURE = "BailingMoeV2ForCausalLM"
_DTYPES = ("bfloat16", "float16", "float32")


def read_fields(raw: object, generation: Mapping[str, Any] | None, source: str) -> dict[str, Any]:
    """The fields of a `ModelConfig` as keyword arguments, from the object in `config.json`.

    `generation` is the object in `generation_config.json`, if any; `source` names the file in messages.
    """
    config = Section(raw, source)
    _check_family(config)
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", default=hidden // heads)
    if config.get("head_dim") is None and hidden % heads:
        config.fail("head_dim", f"head_dim (hidden_size {hidden} is no multiple of num_attention_heads {heads})")
    rope = read_rope(config, head_dim)
    notes: list[str] = []
    fields: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": config.integer("num_hidden_layers", most=1024),
        "vocab_size": config.integer("vocab_size", least=2),
        "num_attention_heads": heads,
        "num_key_value_heads": config.integer("num_key_value_heads"),
        "head_dim": head_dim,
        "rotary_dim": rope.rotary_dim,
        "intermediate_size": config.integer("intermediate_size"),
        "first_k_dense_replace": config.integer("first_k_dense_replace", default=0, least=0),
        **_read_experts(config, notes),
        "rope_theta": rope.theta,
        "max_position_embeddings": config.integer("max_position_embeddings", most=2**24),
        "rope_scaling": rope.scaling,
        "rms_norm_eps": config.number("rms_norm_eps"),
        "use_qk_norm": config.boolean("use_qk_norm", True),
        "tie_word_embeddings": config.boolean("tie_word_embeddings", False),
        "torch_dtype": read_dtype(config),
        **_read_special_tokens(config, generation, notes),
        "quantization": read_quantization(config),
    }
    _note_yarn(config, rope, notes)
    _note_mtp(config, notes)
    notes.extend(check_other_keys(config))
    return {**fields, "notes": tuple(notes)}


def _check_family(config: Section) -> None:
    if config.get("model_type") not in MODEL_TYPES:
        config.fail("model_type", " or ".join(MODEL_TYPES))
    names = config.get("architectures")
    if names is not None and names != [ARCHITECTURE]:  # bailing_moe was also the type of the first generation
        config.fail("architectures", f'["{ARCHITECTURE}"]')


def _read_experts(config: Section, notes: list[str]) -> dict[str, Any]:
    shared, width = config.integer("num_shared_experts", default=0, least=0), config.integer("moe_intermediate_size")
    total = config.get("moe_shared_expert_intermediate_size")
    if shared and total not in (None, width, width * shared):
        config.fail("moe_shared_expert_intermediate_size", f"moe_intermediate_size {width} or {shared} times that")
    if config.get("n_group") is None and config.get("topk_group") is None:
        notes.append("config.json names no n_group: all experts compete as one group.")
    return {
        "num_experts": config.integer("num_experts", most=65536),
        "num_experts_per_tok": config.integer("num_experts_per_tok"),
        "num_shared_experts": shared,
        "moe_intermediate_size": width,
        "n_group": config.integer("n_group", default=1),
        "topk_group": config.integer("topk_group", default=1),
        "routed_scaling_factor": config.number("routed_scaling_factor"),
    }


def read_dtype(config: Section) -> str:
    """The checkpoint's float type, in either spelling of the key; bfloat16 if it says nothing."""
    for key in ("torch_dtype", "dtype"):  # newer Transformers write dtype
        name = config.text(key, "").removeprefix("torch.")
        if name and name not in _DTYPES:
            config.fail(key, " or ".join(_DTYPES))
        if name:
            return name
    return "bfloat16"


def _read_special_tokens(
    config: Section, generation: Mapping[str, Any] | None, notes: list[str]
) -> dict[str, int | tuple[int, ...] | None]:
    """End-of-text ids of both files merged, in order of appearance; ids outside the vocabulary are dropped."""
    vocab = config.integer("vocab_size", least=2)
    places = [config]
    if generation is not None:
        places.append(Section(generation, "generation_config.json"))
    found = {key: [i for place in places for i in _token_ids(place, key)] for key in ("eos", "bos", "pad")}
    outside = sorted({i for ids in found.values() for i in ids if i >= vocab})
    if outside:
        notes.append(f"Ignored special token ids outside the vocabulary of {vocab}: {', '.join(map(str, outside))}.")
    usable = {key: tuple(dict.fromkeys(i for i in ids if i < vocab)) for key, ids in found.items()}
    if not usable["eos"]:
        notes.append("No eos_token_id: generation ends only at its maximum length or a stop string.")
    return {
        "eos_token_ids": usable["eos"],
        "bos_token_id": next(iter(usable["bos"]), None),
        "pad_token_id": next(iter(usable["pad"]), None),
    }


def _token_ids(place: Section, kind: str) -> list[int]:
    key = f"{kind}_token_id"
    value = place.get(key)
    ids = value if isinstance(value, list) and kind == "eos" else [] if value is None else [value]
    if any(type(i) is not int or i < -1 for i in ids):
        place.fail(key, "a token id" + (" or a list of them" if kind == "eos" else ""))
    return [i for i in ids if i >= 0]  # -1 is an old spelling of "none"


def _note_yarn(config: Section, rope: Rope, notes: list[str]) -> None:
    scaling = rope.scaling
    if scaling is None:
        return
    stated, covered = config.integer("max_position_embeddings"), scaling.positions
    if stated > covered:
        raise AngelForgeError(
            f"{config.source}: max_position_embeddings is {stated}, but YaRN with factor {scaling.factor:g} over "
            f"{scaling.original_max_position_embeddings} positions covers only {covered}."
        )
    if stated not in (scaling.original_max_position_embeddings, covered):
        notes.append(
            f"max_position_embeddings is {stated}, but YaRN covers {covered} positions: that is what counts here."
        )


def _note_mtp(config: Section, notes: list[str]) -> None:
    layers = config.integer("num_nextn_predict_layers", default=0, least=0)
    if layers:
        notes.append(
            f"num_nextn_predict_layers is {layers}: the multi-token-prediction layers are dropped; "
            "the model's own output does not depend on them."
        )
