"""Whole FP8 models are judged loosely, yet garbage, other weights and values that are not finite never pass."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.built import make_bundle

from angelforge.bundle import Bundle
from angelforge.engines.cpu import build_cpu
from angelforge.exporter.export import ExportOptions, export
from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.precision import Precision
from angelforge.runtime.validate.data import Schedule, random_sequences, schedule
from angelforge.runtime.validate.references import load_reference_for
from angelforge.runtime.validate.runners import BundleRunner, EngineRunner, JudgeRunner, Outputs, ReferenceRunner
from angelforge.runtime.validate.thresholds import FP8_IN_F32
from angelforge.runtime.validate.whole import Whole, compare_whole

SIZES = {"num_hidden_layers": 2, "vocab_size": 320}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """(checkpoint, bundle) in FP8, with the CPU engine."""
    return make_bundle(tmp_path_factory.mktemp("whole"), SIZES, ExportOptions(precision=Precision.FP8))


def planned() -> Schedule:
    return schedule(random_sequences(2, 320, 30), page_size=64, vocab_size=320, max_context=128, chunk=40)


class _Spoilt(EngineRunner):
    """The CPU engine, and what a fault makes of its outputs."""

    spoil: Callable[[Outputs], None]

    def call(self, feed: dict[str, np.ndarray]) -> Outputs:  # type: ignore[override]
        outputs = super().call(feed)
        self.spoil(outputs)
        return outputs


def judged(bundle: Bundle, found: BundleRunner) -> Whole:
    plan = planned()
    return compare_whole(JudgeRunner(bundle, plan.num_pages), found, plan, FP8_IN_F32)


def test_a_sound_engine_and_the_independent_model_pass(model: tuple[Path, Bundle]) -> None:
    checkpoint, bundle = model
    pages = planned().num_pages
    assert judged(bundle, EngineRunner(bundle, "cpu", pages)).ok
    compute = load_reference_for(f"numpy:{checkpoint}", bundle)
    assert judged(bundle, ReferenceRunner(bundle, compute, "numpy", pages)).ok


def _nan(outputs: Outputs) -> None:
    outputs["logits"] = np.full_like(outputs["logits"], np.nan)


def _one_infinity(outputs: Outputs) -> None:
    outputs["logits"][0, 3] = np.inf


def _zero_caches(outputs: Outputs) -> None:
    outputs["cache.1"] = outputs["cache.1"] * 0


def _other_keys(outputs: Outputs) -> None:
    outputs["cache.0"] = outputs["cache.0"][:, ::-1]


def _fewer_ids(outputs: Outputs) -> None:
    outputs["logits"] = outputs["logits"][:, :-1]


def _permuted(outputs: Outputs) -> None:
    outputs["logits"] = np.roll(outputs["logits"], 7, axis=1)


@pytest.mark.parametrize(
    ("spoil", "tensor", "said"),
    [
        (_nan, "logits", "not finite"),
        (_one_infinity, "logits", "not finite"),
        (_zero_caches, "cache.1", "cosine 0.000"),
        (_other_keys, "cache.0", ""),
        (_fewer_ids, "logits", "expected"),
        (_permuted, "logits", "cosine"),
    ],
)
def test_garbage_fails(model: tuple[Path, Bundle], spoil: Callable[[Outputs], None], tensor: str, said: str) -> None:
    """The tensor is named, and the figures can be told."""
    engine = _Spoilt(model[1], "cpu", planned().num_pages)
    engine.spoil = spoil
    whole = judged(model[1], engine)
    assert not whole.ok
    assert {f.tensor for f in whole.findings if not f.ok} == {tensor}
    assert whole.first is not None
    assert said in whole.first.note
    assert tensor != "logits" or whole.summary()["cosine"] < 0.999


def test_what_fails_by_itself_comes_first(model: tuple[Path, Bundle]) -> None:
    """All calls together tell of no call: keys of the second one are named before logits of the first."""
    plan = schedule(random_sequences(1, 320, 40), page_size=64, vocab_size=320, max_context=128, chunk=16)
    engine = _Spoilt(model[1], "cpu", plan.num_pages)
    calls: list[int] = []

    def late_keys(outputs: Outputs) -> None:
        _permuted(outputs)
        outputs["cache.0"] = outputs["cache.0"] * (-1 if calls == [1] else 1)
        calls.append(1)

    engine.spoil = late_keys
    whole = compare_whole(JudgeRunner(model[1], plan.num_pages), engine, plan, FP8_IN_F32)
    assert {f.tensor for f in whole.findings if not f.ok} == {"cache.0", "logits"}
    assert whole.first is not None
    assert (whole.first.tensor, whole.first.step) == ("cache.0", 1)
    engine.spoil = _permuted
    whole = compare_whole(JudgeRunner(model[1], plan.num_pages), engine, plan, FP8_IN_F32)
    assert whole.first == max((f for f in whole.findings if f.tensor == "logits"), key=lambda f: f.error)


def test_other_weights_fail(model: tuple[Path, Bundle], tmp_path: Path) -> None:
    """The engine of a model of the same shape with other random weights."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_config(**SIZES), seed=1)
    other = export(str(checkpoint), tmp_path / "bundle", ExportOptions(precision=Precision.FP8))
    build_cpu(other)
    whole = judged(model[1], EngineRunner(other, "cpu", planned().num_pages))
    assert {f.tensor for f in whole.findings if not f.ok} >= {"logits", "cache.0"}


def test_a_reference_can_fail(model: tuple[Path, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says nothing, and one that says something that is no number."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "nothing_model.py").write_text(
        "import numpy as np\n\ndef zero(ids):\n    return np.zeros((len(ids), 320))\n"
        "\ndef nan(ids):\n    return zero(ids) * np.nan\n"
    )
    for name in ("zero", "nan"):
        compute = load_reference_for(f"nothing_model:{name}", model[1])
        assert not judged(model[1], ReferenceRunner(model[1], compute, name, planned().num_pages)).ok
