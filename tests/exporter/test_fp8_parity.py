"""A quantised bundle computes FP8 as DESIGN.md says: layer by layer against the reference; near bf16 as a whole.

The reference is given what the graph handed to each half of a layer: over a whole model, one value near the middle of
two e4m3 values, rounded the other way for a difference of 1e-7, would change all that follows.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from support.agreement import Agreement, agreement
from support.built import Sequences, make_bundle

from angelforge.bundle import Bundle
from angelforge.engines.onnxruntime_graph import session_options
from angelforge.engines.widen import widen_activations
from angelforge.exporter.export import ExportOptions
from angelforge.precision import Precision
from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine
from angelforge.runtime.validate.fp8_reference import Fp8Reference, load_fp8_reference
from angelforge.runtime.validate.reference import Reference, load_reference

TOKENS = 48
IDS = np.random.default_rng(0).integers(2, 1000, TOKENS)
FP8 = ExportOptions(precision=Precision.FP8)
MODELS: dict[str, tuple[dict[str, Any], Any]] = {
    "quantised": ({}, "BF16"),
    "ragged, shared experts cut inside blocks": (
        {"hidden_size": 200, "moe_intermediate_size": 72, "num_shared_experts": 2, "num_hidden_layers": 2},
        "BF16",
    ),
    "an FP8 checkpoint": ({"num_hidden_layers": 2}, "FP8"),
}


@dataclass(frozen=True)
class Run:
    """One pass of a bundle's graph."""

    checkpoint: Path
    bundle: Bundle
    states: list[np.ndarray]  # residual stream [T, H]: the embedding, then after every half of a layer
    reference: Fp8Reference


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model, exported in FP8 and run with its residual stream laid open."""
    overrides, dtype = request.param
    checkpoint, bundle = make_bundle(tmp_path_factory.mktemp("fp8"), overrides, FP8, dtype)
    return Run(checkpoint, bundle, residual_stream(bundle), load_fp8_reference(checkpoint))


def residual_stream(bundle: Bundle) -> list[np.ndarray]:
    """Runs the exported graph on IDS, widened as on a CPU."""
    model = ir.load(bundle.folder / "model.onnx")
    widen_activations(model)
    states = [n.outputs[0] for n in model.graph if n.op_type in ("Embedding", "AddNormQuantize", "AddNorm")]
    model.graph.outputs.extend(states)
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), session_options(bundle.folder), providers=["CPUExecutionProvider"]
    )
    config, page = bundle.manifest.model, bundle.manifest.page_size
    pool = np.zeros((2, 2, config.num_key_value_heads, page, config.head_dim), np.float32)
    inputs = {
        "input_ids": IDS,
        "positions": np.arange(TOKENS, dtype=np.int32),
        "num_tokens": np.array([TOKENS], np.int32),
        "query_start": np.array([0, TOKENS], np.int32),
        "kv_length": np.array([TOKENS], np.int32),
        "page_table": np.array([[1]], np.int32),
        "slots": np.arange(page, page + TOKENS, dtype=np.int32),
        "logit_indices": np.arange(TOKENS),
        **{f"kv_cache.{layer}": pool for layer in range(config.num_hidden_layers)},
    }
    return [state.astype(np.float64) for state in session.run([value.name for value in states], inputs)]


def differences(run: Run, reference: Reference, mlp: bool) -> np.ndarray:
    """[layers, T]: how far what a half layer adds to each token is from the reference's, given the same input."""
    found = []
    for layer in range(reference.layers):
        before, after = run.states[2 * layer + mlp], run.states[2 * layer + mlp + 1]
        half = reference.mlp_block if mlp else reference.attention_block
        arguments = (before, layer) if mlp else (before, layer, np.arange(TOKENS))
        expected, *_ = half(*arguments)
        found.append(np.abs(after - expected).max(axis=1) / np.abs(expected - before).max(axis=1))
    return np.array(found)


EXACT, ONE_STEP = 1e-5, 3e-2  # summation order; one value rounded to the e4m3 value beside


def test_every_mlp_rounds_as_the_reference_does(run: Run) -> None:
    """Dense and experts, the inner activation included: nearly all tokens to 1e-5, the others by single steps."""
    found = differences(run, run.reference, mlp=True)
    assert found.max() < ONE_STEP
    assert (found < EXACT).mean() > 0.95


def test_every_attention_rounds_as_the_reference_does(run: Run) -> None:
    """A step in one token's keys and values reaches all later tokens, so whole layers are counted."""
    found = differences(run, run.reference, mlp=False)
    assert found.max() < ONE_STEP
    assert ((found < EXACT).mean(axis=1) > 0.95).mean() >= 0.5


def test_without_rounded_activations_every_token_differs(run: Run) -> None:
    """So that the tests above see the rounding: weights dequantised, activations as they are."""
    exact = Reference(run.reference.config, run.reference.tensor)
    for mlp in (False, True):
        found = differences(run, exact, mlp)
        assert np.median(found) > 2e-2
        assert found.min() > 1e-3


def test_predictions_are_near_those_of_bf16(run: Run) -> None:
    """Of a random model, whose experts and logits are hardly apart: up to a fraction of a nat."""
    engine = OnnxRuntimeEngine(run.bundle, 2)
    (logits,) = Sequences(engine, [[1]]).call([list(IDS)])
    engine.close()
    expected = load_reference(run.checkpoint).logits(IDS)
    found, unrelated = agreement(logits, expected), agreement(np.roll(logits, 1, axis=0), expected)
    assert np.linalg.norm(logits - expected) < 0.45 * np.linalg.norm(expected)
    assert found.mean_kl < 0.4 < 1 < unrelated.mean_kl
    assert found.top1 > 0.4 > unrelated.top1


def test_agreement_by_hand() -> None:
    expected = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    assert agreement(expected + 7, expected) == Agreement(
        2, 1.0, pytest.approx(0, abs=1e-15), pytest.approx(0, abs=1e-15)
    )
    found = agreement(np.log([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]), expected)
    assert found == Agreement(2, 0.5, pytest.approx(np.log(2) / 8), pytest.approx(np.log(2) / 4))
