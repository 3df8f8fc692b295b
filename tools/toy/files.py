"""Writes the toy's checkpoints in the layout that Hugging Face checkpoints have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from angelforge.atomic import write_atomic
from angelforge.exporter.synthetic import small_config
from angelforge.exporter.synthetic_draft import small_draft_config
from angelforge.exporter.synthetic_tokenizer import END, PAD, ROLE_END

VOCABULARY, POSITIONS = 1024, 512

#: config.json of the toy: AntAngelMed's with small sizes.
CONFIG: dict[str, Any] = small_config(
    head_dim=32,
    hidden_size=128,
    intermediate_size=384,
    max_position_embeddings=POSITIONS,
    moe_intermediate_size=96,
    n_group=4,
    num_attention_heads=4,
    num_experts=16,
    num_experts_per_tok=4,
    num_hidden_layers=4,
    num_key_value_heads=2,
    topk_group=2,
    vocab_size=VOCABULARY,
)

#: config.json of the draft: half of the target's tokens, the states behind layers 0, 2 and 3 of 4.
DRAFT_CONFIG: dict[str, Any] = small_draft_config(
    CONFIG, eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 2, 3], "use_aux_hidden_state": True}
)

NOTICE = """# A toy

This model has {parameters:.1f} million parameters and was trained in minutes on invented calls
(`angelforge.tools.toy.grammar`). It exists to show AngelForge at work on any machine.

**It has no medical value. Do not ask it about your health.**

Made by `python -m angelforge.tools.train_toy`; licensed as AngelForge is.
"""


def save_tensors(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Writes model.safetensors, config.json and README.md; what is trained in f32 is rounded to bf16.

    The router's bias stays f32, as in published checkpoints; integers and masks keep their type.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        name: (tensor if name.endswith("expert_bias") or not tensor.is_floating_point() else tensor.bfloat16())
        .detach()
        .contiguous()
        for name, tensor in tensors.items()
    }
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    parameters = sum(tensor.numel() for tensor in stored.values() if tensor.is_floating_point()) / 1e6
    write_atomic(folder / "README.md", NOTICE.format(parameters=parameters))
    write_atomic(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_generation_config(folder: Path) -> None:
    """generation_config.json: the ids that end an answer."""
    content = {"eos_token_id": [END, ROLE_END], "pad_token_id": PAD}
    write_atomic(folder / "generation_config.json", json.dumps(content, indent=2) + "\n")


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, widened to f32 where they are bf16."""
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return {name: tensor.float() if tensor.dtype is torch.bfloat16 else tensor for name, tensor in tensors.items()}
