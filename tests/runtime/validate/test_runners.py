"""Whole models in Polygraphy's Comparator: engine, judge and references agree, over calls that share a pool."""

from pathlib import Path

import numpy as np
import pytest
from support.built import make_bundle
from support.bundles import wrong_weight

from angelforge.bundle import Bundle
from angelforge.errors import AngelForgeError, UsageError
from angelforge.exporter.export import ExportOptions
from angelforge.precision import Precision
from angelforge.runtime import onnxruntime_device
from angelforge.runtime.validate.cuda_graph import ProviderGraph, ProviderRunner
from angelforge.runtime.validate.cutting import CPU
from angelforge.runtime.validate.data import Schedule, random_sequences, schedule
from angelforge.runtime.validate.operations import judge_graph
from angelforge.runtime.validate.references import load_reference_for
from angelforge.runtime.validate.runners import EngineRunner, JudgeRunner, ReferenceRunner, written
from angelforge.runtime.validate.thresholds import F32
from angelforge.runtime.validate.walk import compare_walk
from angelforge.runtime.validate.whole import Whole, compare_whole

SIZES = {"num_hidden_layers": 2, "vocab_size": 320, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """A model of 64 trained positions, stretched to 256."""
    options = ExportOptions(precision=Precision.FP32, rope_scaling="yarn:4")
    return make_bundle(tmp_path_factory.mktemp("runners"), SIZES, options)


def packed(length: int) -> Schedule:
    return schedule(random_sequences(2, 320, length), page_size=64, vocab_size=320, max_context=256, chunk=90)


def test_engine_judge_and_reference_agree_beyond_the_trained_length(model: tuple[Path, Bundle]) -> None:
    """Two sequences over two pages and more, in several calls: logits, keys and values."""
    checkpoint, bundle = model
    planned = packed(110)
    judge = JudgeRunner(bundle, planned.num_pages)
    engine = compare_whole(judge, EngineRunner(bundle, "cpu", planned.num_pages), planned, F32)
    assert engine.ok
    assert {f.tensor for f in engine.findings} == {"logits", "cache.0", "cache.1"}
    compute = load_reference_for(f"numpy:{checkpoint}", bundle)
    named = ReferenceRunner(bundle, compute, "numpy", planned.num_pages)
    found = compare_whole(named, JudgeRunner(bundle, planned.num_pages), planned, F32)
    assert found.ok
    assert {f.tensor for f in found.findings} == {"logits", "cache.0", "cache.1"}
    assert len(found.rows) == planned.positions
    assert found.summary()["top1"] == 1.0


def test_a_wrong_reference_is_seen(model: tuple[Path, Bundle]) -> None:
    """One that forgets YaRN: the first keys that differ are those of layer 0."""
    checkpoint, bundle = model
    from angelforge.runtime.validate.reference import load_reference
    from angelforge.runtime.validate.references import _traced

    reference = load_reference(checkpoint)
    plain = type(reference)({**reference.config, "num_hidden_layers": 2}, reference.tensor)
    planned = packed(20)
    named = ReferenceRunner(bundle, _traced(plain), "numpy", planned.num_pages)
    found = compare_whole(named, JudgeRunner(bundle, planned.num_pages), planned, F32)
    assert not found.ok
    assert found.first is not None
    assert (found.first.place, found.first.tensor) == ("layer 0", "cache.0")


def test_weights_that_the_export_rounded_are_no_difference(tmp_path: Path) -> None:
    """A bf16 bundle of an f32 checkpoint is held against the rounded weights; a wrong one is seen behind its layer."""
    checkpoint, bundle = make_bundle(tmp_path, {**SIZES, "num_hidden_layers": 3}, ExportOptions(Precision.BF16))
    planned = packed(20)

    def beside() -> Whole:
        compute = load_reference_for(f"numpy:{checkpoint}", bundle)
        named = ReferenceRunner(bundle, compute, "numpy", planned.num_pages)
        return compare_whole(named, JudgeRunner(bundle, planned.num_pages), planned, F32)

    assert beside().ok
    wrong_weight(bundle, "model.layers.1.attention.dense.weight", 1.01)
    found = beside().first
    assert found is not None
    assert found.tensor == "cache.2"


def test_a_function_is_a_reference(model: tuple[Path, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named as MODULE:FUNCTION, beside the working folder; what it returns is checked."""
    (tmp_path / "my_model.py").write_text(
        "import numpy as np\n\ndef logits(ids):\n    return np.eye(320)[ids][None]\n\ndef short(ids):\n    return ids\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    _, bundle = model
    compute = load_reference_for("my_model:logits", bundle)
    np.testing.assert_array_equal(compute(np.array([3, 5]))["logits"].argmax(-1), [3, 5])
    with pytest.raises(AngelForgeError, match=r"expected \[2, vocabulary\]"):
        load_reference_for("my_model:short", bundle)(np.array([3, 5]))


@pytest.mark.parametrize("text", ["numpy", "no_such_module:f", "json:no_such_name", "json:__name__", "numpy:nowhere"])
def test_what_is_no_reference_is_refused(model: tuple[Path, Bundle], text: str) -> None:
    with pytest.raises(UsageError):
        load_reference_for(text, model[1])


def test_what_a_call_wrote_is_read_from_any_pool() -> None:
    """Of arrays and of tensors, as engines on a device have them, in any type."""
    import torch

    pool = np.arange(3 * 2 * 2 * 4 * 5, dtype=np.float32).reshape(3, 2, 2, 4, 5)
    feed = {"slots": np.array([9, 4, 0], np.int32), "num_tokens": np.array([2], np.int32)}
    found = written(pool, feed)
    np.testing.assert_array_equal(found, [pool[2, :, :, 1], pool[1, :, :, 0]])
    np.testing.assert_array_equal(written(torch.from_numpy(pool), feed), found)
    assert written(torch.from_numpy(pool).bfloat16(), feed).dtype == np.float32


def test_other_providers_run_the_graph(model: tuple[Path, Bundle]) -> None:
    """The way of `--engine cuda`, here with the CPU in its place: whole and operator by operator."""
    bundle, planned = model[1], packed(20)
    runner = ProviderRunner(bundle, "again", [CPU], planned.num_pages)
    assert compare_whole(JudgeRunner(bundle, planned.num_pages), runner, planned, F32).ok
    judge = judge_graph(bundle)
    found = compare_walk(judge, ProviderGraph(bundle, judge, [CPU]), bundle, planned, F32, by_layer=False)
    assert len(found) > 30
    assert all(finding.error == 0 for finding in found)


def test_cuda_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_device, "find_gpu", lambda: None)
    with pytest.raises(AngelForgeError, match="needs an NVIDIA GPU"):
        onnxruntime_device.cuda_providers()
