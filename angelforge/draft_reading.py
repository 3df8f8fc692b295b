"""Reads a draft's `config.json` into the fields of `DraftConfig`, and what AngelForge itself has saved of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from angelforge.config import ModelConfig
from angelforge.config_json import Section, describe
from angelforge.config_keys import check_other_keys
from angelforge.config_quantization import read_quantization, restore_quantization
from angelforge.config_reading import read_dtype
from angelforge.config_rope import read_rope
from angelforge.errors import AngelForgeError

ARCHITECTURE = "LlamaForCausalLMEagle3"
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_LLAMA_THETA = 10000.0  # what Llama has when its configuration says nothing
_NUMBERS = ("rms_norm_eps", "rope_theta")
_FLAGS = ("fc_norm", "norm_output")


def read_draft_fields(raw: object, target: ModelConfig, source: str) -> dict[str, Any]:
    """The fields of a `DraftConfig` as keyword arguments; `source` names the file in messages."""
    config = Section(_with_llama_defaults(Section(raw, source).raw), source)
    _check_family(config)
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if config.get("head_dim") is None and hidden % heads:
        config.fail("head_dim", f"head_dim (hidden_size {hidden} is no multiple of num_attention_heads {heads})")
    head_dim = config.integer("head_dim", default=hidden // heads)
    fields: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": config.integer("intermediate_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": config.integer("num_key_value_heads", default=heads),
        "head_dim": head_dim,
        "vocab_size": config.integer("vocab_size", default=target.vocab_size),
        "draft_vocab_size": config.integer("draft_vocab_size", default=target.vocab_size),
        "rms_norm_eps": config.number("rms_norm_eps", default=1e-6),
        "rope_theta": _read_theta(config, head_dim),
        "max_position_embeddings": config.integer("max_position_embeddings", default=target.max_context),
        "capture_layers": _read_layers(config, target),
        "fc_norm": config.boolean("fc_norm", False),
        "norm_output": config.boolean("norm_output", False),
        "torch_dtype": read_dtype(config),
        "quantization": read_quantization(config),
    }
    _check_target(config, target, fields)
    notes = _read_notes(config, target, fields["max_position_embeddings"])
    notes += check_other_keys(config, "Only EAGLE3 drafts of one Llama layer, as published, can be exported.")
    return {**fields, "notes": notes}


def _with_llama_defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in raw.items() if value is not None}
    block = given.get("rope_parameters")
    elsewhere = isinstance(block, Mapping) and block.get("rope_theta") is not None
    return {"partial_rotary_factor": 1.0, **({} if elsewhere else {"rope_theta": _LLAMA_THETA}), **given}


def _check_family(config: Section) -> None:
    if config.get("architectures") != [ARCHITECTURE]:
        config.fail("architectures", f'["{ARCHITECTURE}"] (an EAGLE3 draft)')
    if config.get("model_type") not in (None, "llama"):
        config.fail("model_type", "llama")
    if config.integer("num_hidden_layers", default=1) != 1:
        config.fail("num_hidden_layers", "1, the one layer of a draft,")
    if config.boolean("tie_word_embeddings", False):
        config.fail("tie_word_embeddings", "false (a draft has a head of its own)")


def _read_theta(config: Section, head_dim: int) -> float:
    rope = read_rope(config, head_dim)
    if rope.scaling is not None:
        config.fail("rope_scaling", "null (the positions of a draft are not scaled)")
    if rope.rotary_dim != head_dim:
        config.fail("partial_rotary_factor", "1 (a draft rotates whole heads)")
    return rope.theta


def _read_layers(config: Section, target: ModelConfig) -> tuple[int, ...]:
    """The captured layers: as the configuration names them, or 1, N/2 − 1 and N − 4 of N."""
    count = target.num_hidden_layers
    block = config.section("eagle_config")
    named = None
    if block is not None:
        named = block.get(_LAYER_IDS)
        if not block.boolean("use_aux_hidden_state", True):
            block.fail("use_aux_hidden_state", "true (that is what makes it EAGLE3)")
        if unknown := [key for key in block.unread() if block.raw[key] is not False]:
            raise AngelForgeError(f"{block.source} has keys that AngelForge does not know: {', '.join(unknown)}.")
    layers = [1, count // 2 - 1, count - 4] if named is None else named
    if not isinstance(layers, list) or not layers or any(type(layer) is not int for layer in layers):
        raise AngelForgeError(f"{config.source}: {_LAYER_IDS} is {describe(layers)}, but a list of layers is needed.")
    if len(set(layers)) < len(layers) or not all(0 <= layer < count for layer in layers):
        told = ", ".join(map(str, layers))
        if named is None:
            raise AngelForgeError(
                f"{config.source} does not say which layers of the target the draft looks at, and the usual ones "
                f"({told}) are not distinct layers of a target with {count}. Name them in eagle_config.{_LAYER_IDS}."
            )
        raise AngelForgeError(
            f"{config.source}: {_LAYER_IDS} is [{told}], but distinct layers from 0 to {count - 1} are needed: "
            f"the target has {count} layers. Is it the draft's target?"
        )
    return tuple(layers)


def _check_target(config: Section, target: ModelConfig, fields: Mapping[str, Any]) -> None:
    sizes = {
        "hidden_size": (fields["hidden_size"], target.hidden_size),
        "target_hidden_size": (config.integer("target_hidden_size", default=target.hidden_size), target.hidden_size),
        "vocab_size": (fields["vocab_size"], target.vocab_size),
    }
    for key, (found, needed) in sizes.items():
        if found != needed:
            raise AngelForgeError(
                f"{config.source}: {key} is {found}, but the target has {needed}. This draft was made for another "
                "model: give the one that was trained on this target."
            )


def _read_notes(config: Section, target: ModelConfig, trained: int) -> tuple[str, ...]:
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):  # may exceed the vocabulary; the target's count
        config.get(key)
    if trained >= target.max_context:
        return ()
    return (
        f"The draft's configuration names {trained} positions, the target covers {target.max_context}: beyond them "
        "its guesses may be right less often; the output does not change.",
    )


def restore_draft_fields(saved: Section, names: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments of `DraftConfig` (`names`) from what `DraftConfig.to_dict` wrote."""
    fields = {name: _restore(saved, name) for name in names}
    missing = [name for name in names if name not in saved.raw]
    unknown = [name for name in saved.raw if name not in names]
    if missing or unknown:
        raise AngelForgeError(
            f"{saved.source} was written by another version of AngelForge: missing keys {missing}, unknown keys "
            f"{unknown}. Export the checkpoint again."
        )
    return fields


def _restore(saved: Section, name: str) -> Any:
    if name in _NUMBERS:
        return saved.number(name)
    if name in _FLAGS:
        return saved.boolean(name, False)
    if name == "torch_dtype":
        return saved.text(name)
    if name == "quantization":
        return restore_quantization(saved.section(name))
    if name not in ("capture_layers", "notes"):
        return saved.integer(name)
    value, kind = saved.get(name), int if name == "capture_layers" else str
    if not isinstance(value, list) or any(type(item) is not kind for item in value):
        saved.fail(name, f"a list of {kind.__name__}")
    return tuple(value)
