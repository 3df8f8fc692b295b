"""Hugging Face transformers beside the graph: code that the project has not written agrees with it. Long tests."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.built import make_bundle
from support.bundles import wrong_weight

from angelforge.bundle import Bundle
from angelforge.errors import AngelForgeError
from angelforge.exporter.export import ExportOptions
from angelforge.precision import Precision
from angelforge.runtime.validate.data import random_sequences, schedule
from angelforge.runtime.validate.references import load_reference_for
from angelforge.runtime.validate.runners import JudgeRunner, ReferenceRunner
from angelforge.runtime.validate.thresholds import thresholds
from angelforge.runtime.validate.whole import Whole, compare_whole

SIZES = {"num_hidden_layers": 3, "vocab_size": 320, "max_position_embeddings": 64}
STRETCHED = ExportOptions(precision=Precision.FP32, rope_scaling="yarn:4")


def beside_transformers(checkpoint: Path, bundle: Bundle, length: int) -> Whole:
    """Two sequences through the judge and through transformers' model of the checkpoint."""
    planned = schedule(random_sequences(2, 320, length), page_size=64, vocab_size=320, max_context=256, chunk=90)
    compute = load_reference_for(f"transformers:{checkpoint}", bundle)
    named = ReferenceRunner(bundle, compute, "transformers", planned.num_pages)
    limits = thresholds(bundle.manifest.precision, as_stored=False)
    return compare_whole(named, JudgeRunner(bundle, planned.num_pages), planned, limits)


@pytest.mark.full
@pytest.mark.parametrize(
    ("overrides", "options", "length"),
    [
        ({}, STRETCHED, 110),
        ({"num_shared_experts": 2, "first_k_dense_replace": 0}, ExportOptions(precision=Precision.FP32), 40),
        ({"tie_word_embeddings": True, "num_experts_per_tok": 1}, ExportOptions(precision=Precision.FP32), 40),
        ({}, ExportOptions(precision=Precision.BF16), 40),
        ({}, ExportOptions(precision=Precision.FP8), 40),
    ],
)
def test_transformers_agrees(tmp_path: Path, overrides: dict[str, Any], options: ExportOptions, length: int) -> None:
    """Its GLM-4 MoE with a checkpoint's weights: logits, keys and values, also beyond the trained length."""
    whole = beside_transformers(*make_bundle(tmp_path, {**SIZES, **overrides}, options), length)
    assert whole.ok, whole.first
    assert {f.tensor for f in whole.findings} == {"logits", "cache.0", "cache.1", "cache.2"}
    if options.precision is not Precision.FP8:
        assert whole.summary()["relative_error"] < 2e-5


@pytest.mark.full
def test_transformers_sees_a_wrong_weight(tmp_path: Path) -> None:
    """Of the bundle: the first keys and values that differ are those of the layer behind it."""
    checkpoint, bundle = make_bundle(tmp_path, SIZES, ExportOptions(precision=Precision.FP32))
    wrong_weight(bundle, "model.layers.1.attention.dense.weight")
    whole = beside_transformers(checkpoint, bundle, 40)
    assert whole.first is not None
    assert whole.first.tensor == "cache.2"


@pytest.mark.full
def test_models_that_transformers_knows_are_loaded_by_it(tmp_path: Path) -> None:
    """A Llama of the same vocabulary, from its folder, and no code of a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    _, bundle = make_bundle(tmp_path, {**SIZES, "num_hidden_layers": 1}, ExportOptions(precision=Precision.FP32))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes)).eval()
    model.save_pretrained(tmp_path / "llama")
    ids = np.array([3, 5, 7])
    found = load_reference_for(f"transformers:{tmp_path / 'llama'}", bundle)(ids)["logits"]
    with torch.no_grad():
        np.testing.assert_allclose(found, model(torch.from_numpy(ids)[None]).logits[0].numpy(), atol=1e-6)
    (tmp_path / "llama/config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}')
    (tmp_path / "llama/mine.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    with pytest.raises(AngelForgeError, match="without code of the checkpoint"):
        load_reference_for(f"transformers:{tmp_path / 'llama'}", bundle)


def test_without_transformers_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what to do, before anything is read."""
    from angelforge.runtime.validate.transformers_reference import require_transformers

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(AngelForgeError, match="'transformers' is missing: pip install"):
        require_transformers()
