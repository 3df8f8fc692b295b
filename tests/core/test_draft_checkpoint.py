"""A draft's checkpoint: headers against its configuration, and its vocabulary against itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from angelforge.checkpoint import Checkpoint
from angelforge.draft_checkpoint import DraftCheckpoint
from angelforge.errors import AngelForgeError
from angelforge.exporter.synthetic import small_config, write_checkpoint
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


def test_a_draft_of_another_target_is_refused(tmp_path: Path, target: Path) -> None:
    other = write_checkpoint(tmp_path / "other", {**SMALL, "hidden_size": 128}, tokenizer=False)
    draft = write_draft(tmp_path / "draft", other)
    with pytest.raises(AngelForgeError, match=r"hidden_size is 128, but the target has 64.*another model"):
        opened(draft, target)


def test_a_target_is_no_draft(target: Path) -> None:
    with pytest.raises(AngelForgeError, match="LlamaForCausalLMEagle3"):
        opened(target, target)
