"""Hugging Face transformers as a reference.

transformers has no `bailing_moe_v2` of its own, and code of a checkpoint is not run. But its GLM-4 MoE is the same
mathematics: grouped-query attention with normed queries and keys, RoPE on half of a head, dense layers first, a
sigmoid router with biased scores limited to groups, shared experts. So a BailingMoeV2 checkpoint is loaded into that
class under its names. What transformers knows by itself is loaded by its own rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from angelforge.errors import AngelForgeError
from angelforge.runtime.validate.cutting import Array
from angelforge.runtime.validate.reference import Reference, rotary_dim

Compute = Callable[[Array], Mapping[str, Array]]
_NAMES = {  # of a layer, ours: theirs
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "attention.dense.weight": "self_attn.o_proj.weight",
}
_SAME = (  # keys of config.json
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "moe_intermediate_size",
    "num_experts_per_tok",
    "routed_scaling_factor",
)
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def require_transformers() -> None:
    """Raises AngelForgeError where torch or transformers is missing."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise AngelForgeError(
            f"The Python package {error.name!r} is missing: pip install 'transformers>=5' torch, or use "
            "numpy:CHECKPOINT."
        ) from error


def knows(model_type: str) -> bool:
    """Whether transformers has this architecture itself."""
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def native_logits(checkpoint: str) -> Callable[[Array], Any]:
    """int64 [n] → logits [n, vocab] of a checkpoint whose architecture transformers knows; in f32.

    Raises:
        AngelForgeError: transformers refuses the folder, or would need code of the checkpoint.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError) as error:  # it does not know the architecture, or the folder
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise AngelForgeError(
            f"transformers cannot load {checkpoint} without code of the checkpoint: {reason}. "
            "Wrap a model that you trust in a function and name it with --reference MODULE:FUNCTION."
        ) from error
    model = model.float().eval()

    def logits(ids: Array) -> Any:
        with torch.no_grad():
            return model(torch.from_numpy(ids)[None]).logits

    return logits


def as_glm4_moe(reference: Reference) -> Compute:
    """int64 [n] → `logits` [n, vocab] and `cache.<layer>` [n, 2, kv_heads, head_dim]: transformers' GLM-4 MoE in f32.

    `reference` gives configuration and weights, with whatever rounding it was made with; activations are not quantised.

    Raises:
        AngelForgeError: this transformers has other names or shapes; it is tested with 5.
    """
    import torch
    import transformers

    model = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**_config(reference.config))).float().eval()
    weights = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in _weights(reference)}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise AngelForgeError(
            f"transformers {transformers.__version__} has other weights in its GLM-4 MoE than version 5: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error

    def compute(ids: Array) -> dict[str, Array]:
        with torch.no_grad():
            result = model(torch.from_numpy(ids)[None], use_cache=True)
        found = {"logits": result.logits[0].numpy()}
        for layer, entry in enumerate(result.past_key_values.layers):
            found[f"cache.{layer}"] = torch.stack([entry.keys[0], entry.values[0]]).permute(2, 0, 1, 3).numpy()
        return found

    return compute


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Theirs, of a BailingMoeV2 config.json."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": rotary_dim(config) / head_dim}
    scaling = {k: v for k, v in (config.get("rope_scaling") or {}).items() if v is not None and k != "type"}
    return {
        **{name: config[name] for name in _SAME},
        "head_dim": head_dim,
        "n_routed_experts": config["num_experts"],
        "n_shared_experts": config.get("num_shared_experts") or 0,
        "n_group": config.get("n_group") or 1,
        "topk_group": config.get("topk_group") or 1,
        "first_k_dense_replace": config.get("first_k_dense_replace", 0),
        "use_qk_norm": config.get("use_qk_norm", True),
        "norm_topk_prob": config["num_experts_per_tok"] > 1,
        "tie_word_embeddings": False,  # the head is given in any case
        "num_mtp_layers": 0,
        "rope_parameters": {**rope, **scaling, **({"rope_type": "yarn"} if "factor" in scaling else {})},
    }


def _weights(reference: Reference) -> Iterator[tuple[str, Array]]:
    """All weights under their names."""
    config, tensor = reference.config, reference.tensor
    embedding = tensor("model.word_embeddings.weight")
    yield "model.embed_tokens.weight", embedding
    yield "model.norm.weight", tensor("model.norm.weight")
    yield "lm_head.weight", embedding if config.get("tie_word_embeddings") else tensor("lm_head.weight")
    for layer in range(reference.layers):
        prefix = f"model.layers.{layer}."
        for ours, theirs in _NAMES.items():
            yield prefix + theirs, tensor(prefix + ours)
        fused = tensor(prefix + "attention.query_key_value.weight")
        borders = np.cumsum([reference.heads, reference.kv_heads]) * reference.head_dim
        for letter, part in zip("qkv", np.split(fused, borders), strict=True):
            yield f"{prefix}self_attn.{letter}_proj.weight", part
        if config.get("use_qk_norm", True):
            for letter, name in (("q", "query"), ("k", "key")):
                yield f"{prefix}self_attn.{letter}_norm.weight", tensor(f"{prefix}attention.{name}_layernorm.weight")
        dense = layer < config.get("first_k_dense_replace", 0)
        yield from _dense(reference, prefix + "mlp.") if dense else _experts(reference, prefix + "mlp.")


def _dense(reference: Reference, prefix: str) -> Iterator[tuple[str, Array]]:
    for name in _PROJECTIONS:
        yield f"{prefix}{name}.weight", reference.tensor(f"{prefix}{name}.weight")


def _experts(reference: Reference, prefix: str) -> Iterator[tuple[str, Array]]:
    config, tensor = reference.config, reference.tensor
    yield prefix + "gate.weight", tensor(prefix + "gate.weight")
    yield prefix + "gate.e_score_correction_bias", tensor(prefix + "gate.expert_bias")
    gate, up, down = (
        [tensor(f"{prefix}experts.{expert}.{name}.weight") for expert in range(config["num_experts"])]
        for name in _PROJECTIONS
    )
    yield prefix + "experts.gate_up_proj", np.stack([np.concatenate(pair) for pair in zip(gate, up, strict=True)])
    yield prefix + "experts.down_proj", np.stack(down)
    if config.get("num_shared_experts"):
        yield from _dense(reference, prefix + "shared_experts.")
