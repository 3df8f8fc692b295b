"""Restores a configuration that AngelForge itself has written into a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from angelforge.config_json import Section
from angelforge.config_quantization import restore_quantization
from angelforge.config_rope import RopeScaling
from angelforge.errors import AngelForgeError

_NUMBERS = ("routed_scaling_factor", "rope_theta", "rms_norm_eps")
_FLAGS = ("use_qk_norm", "tie_word_embeddings")


def restore_fields(saved: object, source: str, names: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments of `ModelConfig` (`names`) from what `ModelConfig.to_dict` wrote."""
    section = Section(saved, source)
    fields = {name: _restore(section, name) for name in names}
    missing = [name for name in names if name not in section.raw]
    unknown = [name for name in section.raw if name not in names]
    if missing or unknown:
        raise AngelForgeError(
            f"{source} was written by another version of AngelForge: missing keys {missing}, unknown keys {unknown}. "
            "Export the checkpoint again."
        )
    return fields


def _restore(section: Section, name: str) -> Any:
    if name in _NUMBERS:
        return section.number(name)
    if name in _FLAGS:
        return section.boolean(name, False)
    if name == "torch_dtype":
        return section.text(name)
    if name in ("bos_token_id", "pad_token_id"):
        return section.integer(name, default=None, least=0)
    if name in ("eos_token_ids", "notes"):
        return _restore_list(section, name, int if name == "eos_token_ids" else str)
    if name == "rope_scaling":
        return _restore_scaling(section.section(name))
    if name == "quantization":
        return restore_quantization(section.section(name))
    return section.integer(name, least=0 if name in ("first_k_dense_replace", "num_shared_experts") else 1)


def _restore_list(section: Section, name: str, kind: type) -> tuple[Any, ...]:
    value = section.get(name)
    if not isinstance(value, list) or any(type(item) is not kind for item in value):
        section.fail(name, f"a list of {kind.__name__}")
    return tuple(value)


def _restore_scaling(block: Section | None) -> RopeScaling | None:
    if block is None:
        return None
    numbers = ("factor", "attention_factor", "beta_fast", "beta_slow")
    return RopeScaling(
        original_max_position_embeddings=block.integer("original_max_position_embeddings"),
        **{name: block.number(name) for name in numbers},
    )
