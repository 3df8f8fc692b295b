"""Exports: what they refuse, what they leave behind, and that a bundle is the same however it came to be."""

import hashlib
import json
from pathlib import Path

import pytest
from support.built import make_bundle

from angelforge.bundle import Bundle
from angelforge.errors import AngelForgeError, UsageError
from angelforge.exporter.export import ExportOptions, export
from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.precision import Precision


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files of a bundle, without hidden ones."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def test_exporting_twice_gives_identical_bytes(tmp_path: Path, small_checkpoint: Path) -> None:
    for name in ("a", "b"):
        export(str(small_checkpoint), tmp_path / name, ExportOptions())
    export(str(small_checkpoint), tmp_path / "b", ExportOptions())
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_graph_first_and_weights_later_gives_the_same_bundle(tmp_path: Path, small_checkpoint: Path) -> None:
    first = export(str(small_checkpoint), tmp_path / "a", ExportOptions(graph_only=True))
    assert not first.weights_present
    assert not (tmp_path / "a" / "weights").exists()
    export(str(small_checkpoint), tmp_path / "a", ExportOptions())
    export(str(small_checkpoint), tmp_path / "b", ExportOptions())
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_only_config_is_read_for_the_graph(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small_config()))
    assert export(str(tmp_path), tmp_path / "bundle", ExportOptions(graph_only=True)).manifest.weights == "absent"


def test_longer_contexts_than_trained_need_yarn(tmp_path: Path, small_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=r"512 positions.*--rope-scaling yarn:4"):
        export(str(small_checkpoint), tmp_path / "bundle", ExportOptions(max_context=2000))
    assert not (tmp_path / "bundle").exists()
    options = ExportOptions(max_context=2000, rope_scaling="yarn:4")
    manifest = export(str(small_checkpoint), tmp_path / "bundle", options).manifest
    assert manifest.max_context == 2000
    assert manifest.rope == {"factor": 4.0, "attention_factor": pytest.approx(1.138629, abs=1e-6), "rotary_dim": 16}


def test_a_damaged_checkpoint_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_config())
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(AngelForgeError, match=shard.name):
        export(str(checkpoint), tmp_path / "bundle", ExportOptions())
    assert not (tmp_path / "bundle").exists()


def test_other_options_replace_the_bundle(tmp_path: Path) -> None:
    checkpoint, bundle = make_bundle(tmp_path, options=ExportOptions(precision=Precision.FP32))
    export(str(checkpoint), bundle.folder, ExportOptions(precision=Precision.BF16, layers=2))
    manifest = Bundle.open(bundle.folder).manifest
    assert manifest.precision is Precision.BF16
    assert manifest.model.num_hidden_layers == 2
    assert sorted(path.name for path in (bundle.folder / "weights").glob("layer*")) == [
        "layer-000.safetensors",
        "layer-001.safetensors",
    ]
    Bundle.open(bundle.folder).verify()
