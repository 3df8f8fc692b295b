"""Configuration keys beyond the sizes: which are harmless, which must have one value, and what to do with the rest."""

from __future__ import annotations

from typing import Any

from angelforge.config_json import Section, describe
from angelforge.errors import AngelForgeError

# Keys whose value is fixed by the published model code. Absent or null means the same.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "use_bias": (False,),
    "use_qkv_bias": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "norm_head": (False,),
    "norm_softmax": (False,),
    "use_rmsnorm": (True,),
    "score_function": ("sigmoid",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_router_enable_expert_bias": (True,),
    "moe_router_enable_routed_scaling": (True,),
    "moe_router_enable_shared_expert": (True,),
    "moe_layer_freq": (1,),
    "router_dtype": ("fp32", "float32"),
    "use_sliding_window": (False,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "rope_traditional": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
}

# Training, bookkeeping, and the generation defaults that Transformers writes into every configuration.
HARMLESS = frozenset(
    {
        *("auto_map", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range"),
        *("output_router_logits", "attention_dropout", "embedding_dropout", "output_dropout", "hidden_dropout"),
        *("mtp_loss_scaling_factor", "max_window_layers", "seq_aux", "pretraining_tp", "router_aux_loss_coef"),
        *("aux_loss_alpha", "moe_aux_loss_coeff", "z_loss_coeff", "ep_size", "norm_topk_prob", "architectures"),
        *("model_type", "attn_implementation", "return_dict", "output_hidden_states", "output_attentions"),
        *("output_scores", "return_dict_in_generate", "torchscript", "use_bfloat16", "pruned_heads"),
        *("chunk_size_feed_forward", "is_decoder", "cross_attention_hidden_size", "finetuning_task", "id2label"),
        *("label2id", "num_labels", "problem_type", "task_specific_params", "tokenizer_class", "prefix"),
        *("sep_token_id", "decoder_start_token_id", "max_length", "min_length", "do_sample", "early_stopping"),
        *("num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p"),
        *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        *("bad_words_ids", "num_return_sequences", "forced_bos_token_id", "forced_eos_token_id"),
        *("remove_invalid_values", "tf_legacy_loss", "suppress_tokens", "exponential_decay_length_penalty"),
        *("begin_suppress_tokens", "unk_token_id"),
    }
)

# An unknown key of such a name probably changes what is computed.
SUSPICIOUS = (
    *("act", "attention", "attn", "bias", "conv", "delta", "expert", "gate", "group", "head", "layer", "linear"),
    *("lora", "mamba", "moe", "mtp", "multiplier", "norm", "quant", "rope", "rotary", "router", "scal", "score"),
    *("silu", "sink", "softcap", "sparse", "swiglu", "topk", "window", "yarn"),
)


def check_other_keys(
    config: Section, advice: str = "Only BailingMoeV2 models as published can be exported."
) -> tuple[str, ...]:
    """Judges every key that nothing has read; returns notes on what is ignored.

    Raises one AngelForgeError that names all keys whose value would change the mathematics.
    """
    wrong = [
        f"{key} is {describe(config.raw[key])} (only {' or '.join(describe(value) for value in allowed)} is supported)"
        for key, allowed in FIXED.items()
        if not _is_one_of(config.get(key), allowed)
    ]
    wrong += _check_window(config) + _check_layer_types(config) + _check_normalisation(config)
    unknown = [key for key in config.unread() if key not in HARMLESS and not key.startswith("_")]
    suspicious = [key for key in unknown if _is_suspicious(key, config.raw[key])]
    wrong += [f"{key} is {describe(config.raw[key])} (AngelForge does not know this key)" for key in suspicious]
    if wrong:
        raise AngelForgeError(
            f"{config.source} asks for mathematics that AngelForge does not have: {'; '.join(wrong)}. {advice}"
        )
    ignored = [key for key in unknown if key not in suspicious]
    return (f"Ignored keys that AngelForge does not know: {', '.join(ignored)}.",) if ignored else ()


def _is_one_of(value: object, allowed: tuple[Any, ...]) -> bool:
    # Compared with the type: 1 and 1.0 would otherwise pass for true.
    return value is None or any(type(value) is type(item) and value == item for item in allowed)


def _is_suspicious(key: str, value: object) -> bool:
    off = value is False or value in (0, "", [], {}) or value == "default"
    return not off and any(part in key.lower() for part in SUSPICIOUS)


def _check_window(config: Section) -> list[str]:
    window, switch = config.get("sliding_window"), config.get("use_sliding_window")
    if window in (None, 0) or switch is False:  # Qwen-style configurations keep the width and switch it off
        return []
    return [f"sliding_window is {describe(window)} (only full attention is supported)"]


def _check_layer_types(config: Section) -> list[str]:
    kinds = config.get("layer_types")
    if kinds is None or (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)):
        return []
    return [f"layer_types is {describe(kinds)} (only full_attention is supported)"]


def _check_normalisation(config: Section) -> list[str]:
    # The published code normalises whatever this key says, except when a token takes a single expert.
    if config.boolean("norm_topk_prob", True) or config.get("num_experts_per_tok") == 1:
        return []
    return ["norm_topk_prob is false (the published code always normalises; set it to true if the model expects that)"]
