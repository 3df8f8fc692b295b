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


def test_the_graph_alone_may_come_from_the_file(tmp_path: Path, small_checkpoint: Path) -> None:
    """config.json itself, or the folder that it stands in: the same bundle."""
    graph_only = ExportOptions(graph_only=True)
    bundles = [
        export(str(source), tmp_path / name, graph_only)
        for name, source in (("a", small_checkpoint), ("b", small_checkpoint / "config.json"))
    ]
    assert bundles[0].manifest == bundles[1].manifest


def test_a_bundle_is_no_checkpoint(tmp_path: Path, small_checkpoint: Path) -> None:
    """Exporting a bundle is a mistake with a name."""
    bundle = export(str(small_checkpoint), tmp_path / "bundle", ExportOptions(graph_only=True))
    with pytest.raises(UsageError, match="is a bundle already"):
        export(str(bundle.folder), tmp_path / "other", ExportOptions())


def test_a_broken_tokenizer_is_refused_before_packing(tmp_path: Path) -> None:
    """What could not be read when the bundle runs is said before the weights are packed."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_config(num_hidden_layers=2))
    (checkpoint / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(AngelForgeError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        export(str(checkpoint), tmp_path / "bundle", ExportOptions())
    (checkpoint / "tokenizer_config.json").write_text('{"chat_template": ')
    with pytest.raises(AngelForgeError, match=r"tokenizer_config\.json is not valid JSON"):
        export(str(checkpoint), tmp_path / "bundle", ExportOptions())
    assert not (tmp_path / "bundle").exists()


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


class Killed(BaseException):
    """Stands for a kill: nothing of the product catches it."""


def test_a_bundle_whose_export_was_interrupted_is_no_bundle(tmp_path: Path) -> None:
    """Weights of two fine-tunes look alike by name, size and header; a mix of them must never be run."""
    first = write_checkpoint(tmp_path / "first", small_config(), seed=1)
    second = write_checkpoint(tmp_path / "second", small_config(), seed=2)
    bundle = tmp_path / "bundle"
    export(str(first), bundle, ExportOptions())
    before = contents(bundle)

    def kill(done: int, total: int) -> None:
        if any(contents(bundle).get(name) != digest for name, digest in before.items() if name.startswith("weights")):
            raise Killed

    with pytest.raises(Killed):
        export(str(second), bundle, ExportOptions(), kill)
    with pytest.raises(AngelForgeError, match="not a finished bundle"):
        Bundle.open(bundle)
    export(str(second), bundle, ExportOptions())
    export(str(second), tmp_path / "fresh", ExportOptions())
    assert contents(bundle) == contents(tmp_path / "fresh")


def test_too_little_space_leaves_the_bundle_as_it_was(
    tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(str(small_checkpoint), tmp_path / "bundle", ExportOptions())
    before = contents(tmp_path / "bundle")
    monkeypatch.setattr("angelforge.exporter.packer.check_space", refuse)
    with pytest.raises(AngelForgeError, match="too little"):
        export(str(small_checkpoint), tmp_path / "bundle", ExportOptions(precision=Precision.FP32))
    assert contents(tmp_path / "bundle") == before


def refuse(*arguments: object) -> None:
    """In place of the check of a full disk."""
    raise AngelForgeError("too little space")


def test_leftovers_of_a_killed_export_are_removed(tmp_path: Path, small_checkpoint: Path) -> None:
    bundle = export(str(small_checkpoint), tmp_path / "bundle", ExportOptions()).folder
    half = bundle / ".tokenizer.json.tmp-99999-0123abcd"
    half.write_bytes(b"half")
    export(str(small_checkpoint), bundle, ExportOptions())
    assert not half.exists()


def test_nothing_but_a_bundle_is_written_over(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_config())
    with pytest.raises(UsageError, match="folder of its own"):
        export(str(checkpoint), checkpoint, ExportOptions())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.onnx").write_text("mine")
    with pytest.raises(UsageError, match="new or empty folder"):
        export(str(checkpoint), tmp_path / "other", ExportOptions())
    assert (tmp_path / "other" / "model.onnx").read_text() == "mine"


def test_weights_are_not_disowned_by_a_graph(tmp_path: Path, small_checkpoint: Path) -> None:
    export(str(small_checkpoint), tmp_path / "bundle", ExportOptions())
    with pytest.raises(UsageError, match="--graph-only"):
        export(str(small_checkpoint), tmp_path / "bundle", ExportOptions(graph_only=True))
    assert Bundle.open(tmp_path / "bundle").weights_present
