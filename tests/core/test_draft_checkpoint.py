"""A draft's checkpoint: headers against its configuration, and its vocabulary against itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from angelforge.checkpoint import Checkpoint
from angelforge.config import Quantization
from angelforge.draft_checkpoint import DraftCheckpoint
from angelforge.draft_config import DraftConfig
from angelforge.errors import AngelForgeError
from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.exporter.synthetic_config import FP8_BLOCK
from angelforge.exporter.synthetic_draft import small_draft_config, write_draft

SMALL = small_config(
    hidden_size=64, num_hidden_layers=3, num_experts=8, moe_intermediate_size=32, intermediate_size=96, vocab_size=64
)
Tensors = dict[str, np.ndarray]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", SMALL, tokenizer=False)


def opened(draft: Path, target: Path) -> DraftCheckpoint:
    """The draft, checked."""
    found = DraftCheckpoint.open(draft, Checkpoint.open(target).config)
    found.check()
    return found


@pytest.mark.parametrize("changes", [{}, {"fc_norm": True}, {"draft_vocab_size": 64}, {"head_dim": None}])
def test_a_draft_that_fits_is_accepted(tmp_path: Path, target: Path, changes: dict[str, Any]) -> None:
    draft = opened(write_draft(tmp_path / "draft", target, small_draft_config(SMALL, **changes)), target)
    assert {"fc_norm.0.weight", "fc_norm.2.weight"} <= set(draft.tensors) or not changes.get("fc_norm")
    assert draft.config.draft_vocab_size == changes.get("draft_vocab_size", 32)


def _drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(name) is None


def _set(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def _second_like_first(offsets: np.ndarray) -> np.ndarray:
    return np.concatenate([offsets[:1], offsets[:1] - 1, offsets[2:]])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_drop("fc.weight"), "1 missing (fc.weight)"),
        (lambda t: t.update(embed_tokens=t["fc.weight"]), "1 unexpected (embed_tokens)"),
        (_set("fc.weight", lambda w: np.ascontiguousarray(w[:, :128])), "fc.weight is [64, 128], expected [64, 192]"),
        (_set("d2t", lambda d: d.astype(np.int32)), "d2t is I32, expected I64"),
        (_drop("t2d"), "1 missing (t2d)"),
        (_set("d2t", lambda d: d + 1000), "out of the target's vocabulary of 64"),
        (_set("d2t", lambda d: d - 2**62), "out of the target's vocabulary of 64"),
        (_set("d2t", _second_like_first), "two draft tokens to one token"),
        (_set("t2d", np.logical_not), "t2d marks 32 and not the same ones"),
        (_set("t2d", np.ones_like), "names 32 tokens of the target, t2d marks 64"),
    ],
)
def test_damage_is_told(tmp_path: Path, target: Path, damage: Callable[[Tensors], None], said: str) -> None:
    draft = write_draft(tmp_path / "draft", target, dtype="F32")
    tensors = load_file(draft / "model.safetensors")
    damage(tensors)
    save_file(tensors, draft / "model.safetensors")
    with pytest.raises(AngelForgeError) as caught:
        opened(draft, target)
    assert said in str(caught.value)


@pytest.mark.parametrize("fc", ["F8_E4M3", "BF16"])
def test_an_fp8_draft_is_accepted(tmp_path: Path, target: Path, fc: str) -> None:
    """Its layer is e4m3 with scales, `fc` may be."""
    draft = write_draft(tmp_path / "draft", target, dtype="FP8")
    if fc == "BF16":
        tensors = load_torch(draft / "model.safetensors")
        del tensors["fc.weight_scale_inv"]
        tensors["fc.weight"] = tensors["fc.weight"].bfloat16()
        save_torch(tensors, draft / "model.safetensors")
    found = opened(draft, target)
    assert found.config.quantization == Quantization()
    assert found.tensors["fc.weight"].dtype.value == fc
    assert found.tensors["midlayer.mlp.down_proj.weight"].dtype.value == "F8_E4M3"
    assert DraftConfig.from_saved(json.loads(json.dumps(found.config.to_dict()))) == found.config


@pytest.mark.parametrize(
    ("stored", "keys", "said"),
    [
        ("FP8", {"quantization_config": None}, "They are FP8, but config.json has no quantization_config"),
        ("BF16", {"quantization_config": FP8_BLOCK}, "config.json says FP8, but no tensor is"),
        ("FP8", {"quantization_config": {**FP8_BLOCK, "quant_method": "awq"}}, "quant_method"),
        ("FP8", {"quantization_config": {**FP8_BLOCK, "weight_block_size": [1, 128]}}, "weight_block_size"),
        ("FP8 head", {}, "lm_head.weight is F8_E4M3, expected BF16 or F16 or F32"),
    ],
)
def test_other_fp8_drafts_are_refused(
    tmp_path: Path, target: Path, stored: Any, keys: dict[str, Any], said: str
) -> None:
    draft = write_draft(tmp_path / "draft", target, dtype=stored.removesuffix(" head"))
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps({**config, **keys}))
    if stored == "FP8 head":
        tensors = load_torch(draft / "model.safetensors")
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
        save_torch(tensors, draft / "model.safetensors")
    with pytest.raises(AngelForgeError) as caught:
        opened(draft, target)
    assert said in str(caught.value)


def test_a_draft_of_another_target_is_refused(tmp_path: Path, target: Path) -> None:
    other = write_checkpoint(tmp_path / "other", {**SMALL, "hidden_size": 128}, tokenizer=False)
    draft = write_draft(tmp_path / "draft", other)
    with pytest.raises(AngelForgeError, match=r"hidden_size is 128, but the target has 64.*another model"):
        opened(draft, target)


def test_a_target_is_no_draft(target: Path) -> None:
    with pytest.raises(AngelForgeError, match="LlamaForCausalLMEagle3"):
        opened(target, target)
