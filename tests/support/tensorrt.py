"""TensorRT for RTX in tests: it builds engines without a GPU; where it is not installed, tests are skipped."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from angelforge.bundle import Bundle
from angelforge.errors import AngelForgeError
from angelforge.exporter.export import ExportOptions, export
from angelforge.exporter.synthetic_config import small_config
from angelforge.exporter.synthetic_draft import small_draft_config, write_draft
from angelforge.plugins.tensorrt.library import Library, load_library
from angelforge.precision import Precision


def rtx() -> Library:
    """TensorRT for RTX; skips the test with the reason where it cannot be loaded."""
    try:
        return load_library("tensorrt-rtx")
    except AngelForgeError as error:
        pytest.skip(str(error))


def graph_bundle(folder: Path, precision: Precision = Precision.BF16, draft: bool = False, **changes: Any) -> Bundle:
    """A bundle of a small model with the graphs alone, no weights, in `folder`/bundle."""
    config = small_config() | changes
    if precision is Precision.FP8:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
    source = folder / "checkpoint"
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(config))
    options = ExportOptions(precision=precision, graph_only=True)
    if draft:
        drafted = write_draft(folder / "draft", source, small_draft_config(config))
        options = dataclasses.replace(options, draft=str(drafted))
    return export(str(source), folder / "bundle", options)


def quiet(phase: str, share: float) -> None:
    """A progress report that says nothing."""
