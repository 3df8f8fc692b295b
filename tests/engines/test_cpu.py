"""The CPU engine's files: a build that ends early leaves the engines that were there."""

import os
from pathlib import Path
from typing import Any

import pytest

from angelforge.bundle import Bundle
from angelforge.engines.cpu import build_cpu, engine_folder, open_draft_engine, open_engine
from angelforge.exporter.export import ExportOptions, export
from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.exporter.synthetic_draft import write_draft


def engines(bundle: Bundle) -> list[Path]:
    return sorted(engine_folder(bundle, "cpu").glob("*.onnx"))


def test_an_interrupted_build_leaves_a_working_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever file is the last to appear: engines that the manifests name are whole and open."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_config(num_hidden_layers=3))
    draft = write_draft(tmp_path / "draft", checkpoint)
    bundle = export(str(checkpoint), tmp_path / "bundle", ExportOptions(draft=str(draft)))
    build_cpu(bundle)
    good = [path.name for path in engines(bundle)]
    (bundle.folder / "engines" / "cpu" / good[0]).rename(bundle.folder / "engines" / "cpu" / "model-old.onnx")
    build_cpu(bundle)
    assert [path.name for path in engines(bundle)] == good  # older ones go, names follow from content
    real, done = os.replace, False
    for last in range(10):
        left = [last]

        def replace(*args: Any, left: list[int] = left, **options: Any) -> None:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            real(*args, **options)

        monkeypatch.setattr(os, "replace", replace)
        try:
            build_cpu(bundle)
            done = True
        except KeyboardInterrupt:
            pass
        monkeypatch.undo()
        assert open_engine(bundle) and open_draft_engine(bundle)
        if done:
            assert last == 4  # two engines, two manifests
            return
    raise AssertionError("The build never came to its end.")
