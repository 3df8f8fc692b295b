"""`validate BUNDLE --draft --reference numpy:DRAFT`: wrong weights and wrong wires of a draft are named."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from support.faults import change_tensor

from angelforge.bundle import Bundle
from angelforge.engines.cpu import build_cpu
from angelforge.exporter.export import ExportOptions, export
from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.exporter.synthetic_draft import small_draft_config, write_draft
from angelforge.precision import Precision
from angelforge.tools.cli import main
from angelforge.tools.toy import DRAFT, MODEL

FEW = ("--draft", "--random", "2", "--length", "40")
KEYS, STEP, HEAD = "norms, k and v projections, rotation", "attention and MLP", "norm and Linear (lm_head)"
Change = Callable[[np.ndarray], np.ndarray]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["validate", *map(str, arguments)])


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """The toy with its draft in every precision."""
    made = {}
    for precision in Precision:
        folder = tmp_path_factory.mktemp("toy") / precision.value
        made[precision.value] = export(str(MODEL), folder, ExportOptions(precision=precision, draft=str(DRAFT)))
        build_cpu(made[precision.value])
    return made


def rows_scaled(array: np.ndarray) -> np.ndarray:
    """One row half as large."""
    changed = array.copy()
    changed[1] = (changed[1].astype(np.float32) / 2).astype(array.dtype)
    return changed


def two_swapped(offsets: np.ndarray) -> np.ndarray:
    """The first two tokens of the draft for one another; d2t is an id less the token's own number."""
    changed = offsets.copy()
    changed[:2] = offsets[1] + 1, offsets[0] - 1
    return changed


def named(bundle: Bundle, reference: Path = DRAFT) -> tuple[str, str]:
    """Where a failure was found, and in what."""
    result = run(bundle.folder, *FEW, "--reference", f"numpy:{reference}", "--json")
    assert result.exit_code == 1, result.output
    told = json.loads(result.stdout)
    assert told["operators"] and all(finding["ok"] for finding in told["operators"])
    first = told["first_diverging"]
    return first["place"].split(",")[0], first["operator"]


def damaged(bundle: Bundle, folder: Path, name: str, change: Change) -> Bundle:
    """A copy whose own file holds another weight: graph and engine agree on it."""
    shutil.copytree(bundle.folder, folder)
    change_tensor(bundle, folder, name, change)
    return Bundle.open(folder)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_a_sound_draft_passes(toys: dict[str, Bundle], precision: str) -> None:
    result = run(toys[precision].folder, *FEW, "--reference", f"numpy:{DRAFT}", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert {f["tensor"] for f in told["halves"]} == {"d2t", "draft_hidden", "keys and values", "hidden_out", "logits"}
    assert all(finding["ok"] for finding in told["halves"])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_what_is_handed_over_wrongly_is_named(toys: dict[str, Bundle], tmp_path: Path, precision: str) -> None:
    """`fc` rolled by one row; and a target that takes another layer than the draft's configuration says."""
    bundle = damaged(toys[precision], tmp_path / "bundle", "draft.fc.weight", partial(np.roll, shift=1, axis=0))
    assert named(bundle) == ("captured states", "Linear (fc)")
    other = tmp_path / "draft"
    shutil.copytree(DRAFT, other)
    config = json.loads((other / "config.json").read_text())
    config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = [0, 1, 3]
    (other / "config.json").write_text(json.dumps(config))
    assert named(toys[precision], other) == ("captured states", "Linear (fc)")


def test_a_failure_is_told(toys: dict[str, Bundle], tmp_path: Path) -> None:
    """In words, with the command to type next, which finds the damaged file."""
    bundle = damaged(toys["fp32"], tmp_path / "bundle", "draft.fc.weight", partial(np.roll, shift=1, axis=0))
    result = run(bundle.folder, *FEW, "--reference", f"numpy:{DRAFT}")
    assert result.exit_code == 1
    assert "first diverging tensor: captured states, Linear (fc): draft_hidden" in result.stdout
    assert "differs in captured states" in " ".join(result.output.split())
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("next: ")]
    verify = line.removeprefix("next: angelforge ").split("    (")[0].split()
    assert verify == ["inspect", str(bundle.folder), "--verify"]
    assert CliRunner().invoke(main, verify).exit_code == 1


@pytest.mark.parametrize(
    ("name", "change", "operator"),
    [
        ("draft.d2t", two_swapped, "the target's ids of its tokens"),
        ("draft.midlayer.hidden_norm.weight", rows_scaled, KEYS),
        ("draft.midlayer.self_attn.qkv_proj.state.weight", rows_scaled, STEP),
        ("draft.midlayer.post_attention_layernorm.weight", rows_scaled, STEP),
        ("draft.midlayer.mlp.up_proj.weight", rows_scaled, STEP),
        ("draft.norm.weight", rows_scaled, HEAD),
        ("draft.lm_head.weight", rows_scaled, HEAD),
        ("draft.rope.cos", lambda old: old[::-1], KEYS),
    ],
)
def test_a_wrong_weight_is_named(
    toys: dict[str, Bundle], tmp_path: Path, name: str, change: Change, operator: str
) -> None:
    """In FP8, where it is hardest. Of q one row alone: what it projects is in no cache."""
    assert named(damaged(toys["fp8"], tmp_path / "bundle", name, change)) == ("draft", operator)


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8])
@pytest.mark.parametrize(
    ("changes", "dtype"), [({"fc_norm": True, "norm_output": True, "head_dim": 40}, "BF16"), ({"head_dim": 64}, "FP8")]
)
def test_other_drafts_pass(tmp_path: Path, changes: dict[str, Any], dtype: Any, precision: Precision) -> None:
    """With norms, with heads of another size, of an FP8 checkpoint."""
    target = small_config(num_experts=8, num_hidden_layers=3)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", target)
    draft = write_draft(tmp_path / "draft", checkpoint, small_draft_config(target, **changes), dtype=dtype)
    bundle = export(str(checkpoint), tmp_path / "bundle", ExportOptions(precision=precision, draft=str(draft)))
    build_cpu(bundle)
    result = run(bundle.folder, *FEW, "--reference", f"numpy:{draft}")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        (f"numpy:{MODEL}", "has draft_vocab_size 1024"),
        ("numpy:nowhere", "no config.json"),
        (f"transformers:{DRAFT}", "numpy:DRAFT_CHECKPOINT"),
        ("numpy", "numpy:DRAFT_CHECKPOINT"),
        ("module:function", "numpy:DRAFT_CHECKPOINT"),
    ],
)
def test_a_reference_of_something_else_is_refused(toys: dict[str, Bundle], reference: str, said: str) -> None:
    result = run(toys["fp32"].folder, *FEW, "--reference", reference)
    assert result.exit_code == 2, result.output
    assert said in result.output
