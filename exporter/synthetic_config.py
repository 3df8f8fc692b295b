"""Configurations for synthetic checkpoints: a small one of every size to choose, and AntAngelMed's own."""

from __future__ import annotations

from typing import Any

#: AntAngelMed's config.json by its published figures: 103B parameters, 6.1B of them active per token.
FULL_CONFIG: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "eos_token_id": 156892,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 32768,
    "model_type": "bailing_moe",
    "moe_intermediate_size": 1024,
    "moe_router_enable_expert_bias": True,
    "n_group": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "pad_token_id": 156891,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600000,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": True,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "vocab_size": 157184,
}

#: What an FP8 checkpoint adds to its config.json: e4m3 weights, one f32 scale for each 128×128 block.
FP8_BLOCK: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}

_SMALL: dict[str, Any] = {
    "eos_token_id": 1,
    "head_dim": 32,
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "model_type": "bailing_moe_v2",
    "moe_intermediate_size": 128,
    "n_group": 4,
    "num_attention_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "topk_group": 2,
    "vocab_size": 1024,
}


def small_config(**overrides: Any) -> dict[str, Any]:
    """The config.json of a small model with AntAngelMed's architecture; `overrides` replace or add keys.

    Hidden size 256, 4 layers (the first dense), 16 experts in 4 groups of which 2 are kept, 4 experts per token,
    8 heads of 32 over 2 KV heads, half of each head rotated, 1024 ids, 512 positions. The ids of end and padding are
    those of the tokenizer that `write_checkpoint` writes.
    """
    return {**FULL_CONFIG, **_SMALL, **overrides}
