"""ONNX Runtime 1.23, the last one for Python 3.10, knows opset 23 only: the CPU engine is written for it."""

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest

from angelforge.bundle import Bundle
from angelforge.engines.cpu import build_cpu, engine_folder
from angelforge.exporter.export import ExportOptions, export
from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.runtime.batch import Batch, Float32
from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine


def opsets(bundle: Bundle) -> set[int]:
    """Versions of ONNX's own operators that the CPU engine asks for."""
    (engine,) = engine_folder(bundle, "cpu").glob("*.onnx")
    model = onnx.load(engine, load_external_data=False)
    return {item.version for item in model.opset_import if item.domain == ""}


def logits(bundle: Bundle) -> Float32:
    """Of four tokens of one sequence. [4, vocab]"""
    batch = Batch(
        input_ids=np.array([5, 6, 7, 8]),
        positions=np.arange(4, dtype=np.int32),
        num_tokens=np.array([4], np.int32),
        query_start=np.array([0, 4], np.int32),
        kv_length=np.array([4], np.int32),
        page_table=np.array([[1]], np.int32),
        slots=np.arange(4, dtype=np.int32) + bundle.manifest.page_size,
        logit_indices=np.arange(4),
    )
    engine = OnnxRuntimeEngine(bundle, num_pages=2)
    try:
        return engine.forward(batch).copy()
    finally:
        engine.close()


@pytest.mark.parametrize("dtype", ["F32", "BF16", "FP8"])
def test_the_engine_means_the_same_in_opset_23(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Literal["F32", "BF16", "FP8"]
) -> None:
    """Built for the older version, the engine asks for opset 23 and computes the same logits, bit for bit."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_config(num_hidden_layers=2), dtype=dtype)
    bundle = export(str(checkpoint), tmp_path / "bundle", ExportOptions())
    build_cpu(bundle)
    expected = logits(bundle)
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    build_cpu(bundle)
    assert opsets(bundle) == {23}
    np.testing.assert_array_equal(logits(bundle), expected)
