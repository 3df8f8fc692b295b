"""The exported graph computes what the model is: logits against the independent reference, to 2e-5 relative in f32."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.built import Sequences, make_bundle, relative_error

from angelforge.exporter.export import ExportOptions
from angelforge.precision import Precision
from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine
from angelforge.runtime.validate.reference import Reference, load_reference

TOLERANCE = 2e-5
FP32 = ExportOptions(precision=Precision.FP32)
PAGES = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Reference, OnnxRuntimeEngine]]:
    """The small model with YaRN: 512 trained positions stretched to 2048."""
    options = ExportOptions(precision=Precision.FP32, rope_scaling="yarn:4")
    checkpoint, bundle = make_bundle(tmp_path_factory.mktemp("parity"), options=options)
    reference = load_reference(checkpoint)
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    reference = Reference({**reference.config, "rope_scaling": scaling}, reference.tensor)
    engine = OnnxRuntimeEngine(bundle, 2 * PAGES + 1)
    yield reference, engine
    engine.close()


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random ids."""
    return list(np.random.default_rng(seed).integers(0, 1000, count))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 300, 700])
def test_prompts_of_any_length(model: tuple[Reference, OnnxRuntimeEngine], length: int) -> None:
    reference, engine = model
    ids = tokens(length, length)
    (logits,) = Sequences(engine, [range(1, PAGES)]).call([ids])
    assert relative_error(logits, reference.logits(ids)) < TOLERANCE


def test_one_packed_call_is_the_same_as_one_sequence_at_a_time(model: tuple[Reference, OnnxRuntimeEngine]) -> None:
    _, engine = model
    prompts = [tokens(count, count) for count in (5, 64, 1, 70)]
    pages = [[1, 2], [3, 4], [5, 6], [7, 8]]
    packed = Sequences(engine, pages).call(prompts)
    alone = [Sequences(engine, [own]).call([ids])[0] for own, ids in zip(pages, prompts, strict=True)]
    for left, right in zip(packed, alone, strict=True):
        assert relative_error(left, right) < 1e-6


def test_token_by_token_and_in_chunks_is_the_same_as_at_once(model: tuple[Reference, OnnxRuntimeEngine]) -> None:
    _, engine = model
    ids = tokens(80, 1)
    (whole,) = Sequences(engine, [[1, 2]]).call([ids])
    single = Sequences(engine, [[3, 4]])
    one_by_one = np.concatenate([single.call([[token]])[0] for token in ids])
    chunked = Sequences(engine, [[5, 6]])
    chunks = np.concatenate([chunked.call([ids[start : start + 23]])[0] for start in range(0, 80, 23)])
    assert relative_error(one_by_one, whole) < 5e-6
    assert relative_error(chunks, whole) < 5e-6


def test_decodes_and_prompts_mix_in_one_call(model: tuple[Reference, OnnxRuntimeEngine]) -> None:
    reference, engine = model
    running, new = tokens(90, 2), tokens(40, 3)
    sequences = Sequences(engine, [[1, 2], [3, 4]])
    sequences.call([running[:89], []])
    decode, prompt = sequences.call([running[89:], new])
    assert relative_error(decode[-1], reference.logits(running)[-1]) < TOLERANCE
    assert relative_error(prompt, reference.logits(new)) < TOLERANCE


def test_a_call_may_pack_more_tokens_than_a_sequence_has_positions(tmp_path: Path) -> None:
    checkpoint, bundle = make_bundle(tmp_path, options=ExportOptions(precision=Precision.FP32, max_context=48))
    engine = OnnxRuntimeEngine(bundle, 4)
    prompts = [tokens(48, 1), tokens(40, 2), tokens(17, 3)]
    for found, ids in zip(Sequences(engine, [[1], [2], [3]]).call(prompts), prompts, strict=True):
        assert relative_error(found, load_reference(checkpoint).logits(ids)) < TOLERANCE
    engine.close()


def test_permuted_pages_change_nothing(model: tuple[Reference, OnnxRuntimeEngine]) -> None:
    _, engine = model
    ids = tokens(200, 4)
    (ordered,) = Sequences(engine, [[1, 2, 3, 4]]).call([ids])
    (permuted,) = Sequences(engine, [[9, 4, 20, 1]]).call([ids])
    np.testing.assert_array_equal(ordered, permuted)


def test_padding_rows_and_sequences_change_nothing(model: tuple[Reference, OnnxRuntimeEngine]) -> None:
    _, engine = model
    prompts = [tokens(20, 5), tokens(3, 6)]
    plain = Sequences(engine, [[1], [2]]).call(prompts)
    before = engine.pools[1][3:].copy()
    padded = Sequences(engine, [[1], [2]]).call(prompts, padding=5, empty=2)
    for left, right in zip(plain, padded, strict=True):
        assert relative_error(right, left) < 1e-6
    np.testing.assert_array_equal(engine.pools[1][3:], before)  # padding writes to page 0 alone


SIZES = {
    "so few experts that their biases look like constants": {"num_experts": 8},
    "no groups": {"n_group": 1, "topk_group": 1},
    "other groups": {"num_experts": 12, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 5},
    "head_dim apart from hidden size": {"head_dim": 48, "partial_rotary_factor": 0.25},
    "one key/value head": {"num_key_value_heads": 1},
    "three shared experts": {"num_shared_experts": 3},
    "no shared expert": {"num_shared_experts": 0},
    "two dense layers": {"first_k_dense_replace": 2, "num_hidden_layers": 3},
    "one expert a token": {"num_experts_per_tok": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "odd sizes": {"hidden_size": 200, "moe_intermediate_size": 72, "intermediate_size": 300},
}


@pytest.mark.parametrize("overrides", SIZES.values(), ids=SIZES)
def test_models_of_other_sizes(tmp_path: Path, overrides: dict[str, Any]) -> None:
    checkpoint, bundle = make_bundle(tmp_path, overrides, FP32)
    engine = OnnxRuntimeEngine(bundle, 4)
    ids = tokens(70, 8)
    (logits,) = Sequences(engine, [[2, 1]]).call([ids])
    engine.close()
    assert relative_error(logits, load_reference(checkpoint).logits(ids)) < TOLERANCE


def test_bf16_bundles_compute_with_the_checkpoints_own_weights(tmp_path: Path) -> None:
    """On a CPU bf16 is widened to f32, so a bf16 checkpoint is computed as exactly as an f32 one."""
    checkpoint, bundle = make_bundle(tmp_path, dtype="BF16")
    assert bundle.manifest.precision is Precision.BF16
    engine = OnnxRuntimeEngine(bundle, 4)
    ids = tokens(70, 9)
    (logits,) = Sequences(engine, [[2, 1]]).call([ids])
    engine.close()
    assert relative_error(logits, load_reference(checkpoint).logits(ids)) < TOLERANCE


def test_the_first_layers_alone(tmp_path: Path) -> None:
    options = ExportOptions(precision=Precision.FP32, layers=2)
    checkpoint, bundle = make_bundle(tmp_path, options=options)
    reference = load_reference(checkpoint)
    engine = OnnxRuntimeEngine(bundle, 4)
    ids = tokens(10)
    (logits,) = Sequences(engine, [[1]]).call([ids])
    engine.close()
    expected = Reference({**reference.config, "num_hidden_layers": 2}, reference.tensor).logits(ids)
    assert relative_error(logits, expected) < TOLERANCE
