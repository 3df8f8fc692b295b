"""`doctor --deep`: what it does where there is no GPU, and that its comparison sees what is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tensorrt import rtx

from angelforge.bundle import Bundle
from angelforge.errors import AngelForgeError
from angelforge.precision import Precision
from angelforge.runtime.batch import Batch
from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine
from angelforge.tools import deep, deep_steps


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return deep_steps.small_bundle(tmp_path_factory.mktemp("deep"), Precision.BF16)


Run = Callable[[Batch, deep_steps.Arrays, int], tuple[np.ndarray[Any, Any], deep_steps.Arrays]]


def other_engine(bundle: Bundle, spoil: Callable[[np.ndarray[Any, Any], deep_steps.Arrays], None]) -> Run:
    """ONNX Runtime in TensorRT's place, with a mistake made on purpose."""
    engine = OnnxRuntimeEngine(bundle, deep_steps.PAGES)

    def run(batch: Batch, pools: deep_steps.Arrays, tokens: int) -> tuple[np.ndarray[Any, Any], deep_steps.Arrays]:
        logits = engine.forward(batch).copy()
        written = {name: np.array(pool) for name, pool in zip(pools, engine.pools, strict=True)}
        spoil(logits, written)
        return logits, written

    return run


def test_equal_engines_are_equal(bundle: Bundle) -> None:
    text = deep_steps.compare(bundle, other_engine(bundle, lambda logits, pools: None))
    assert text == "relative error against ONNX Runtime: prompt 0, decode 0, pool 0"


def wrong_logits(logits: np.ndarray[Any, Any], pools: deep_steps.Arrays) -> None:
    logits *= 1.2


def no_numbers(logits: np.ndarray[Any, Any], pools: deep_steps.Arrays) -> None:
    logits[0, 0] = np.nan


def unwritten_pool(logits: np.ndarray[Any, Any], pools: deep_steps.Arrays) -> None:
    pools["kv_cache.2"][:] = 0


@pytest.mark.parametrize("mistake", [wrong_logits, no_numbers, unwritten_pool])
def test_mistakes_are_seen(bundle: Bundle, mistake: Any) -> None:
    with pytest.raises(AngelForgeError, match="differs from ONNX Runtime, relative error"):
        deep_steps.compare(bundle, other_engine(bundle, mistake))


def test_the_calls_keep_the_contract() -> None:
    """Both steps obey the rules of the graph's inputs for the small model."""
    for batch in deep_steps.steps():
        batch.check(1024, 64, deep_steps.PAGES, deep_steps.CONTEXT)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is told: what can be tried is, the others say what they need."""
    rtx()
    monkeypatch.setattr(deep.machine, "gpus", tuple)
    told: list[str] = []
    findings = list(deep.examine_deeply(told.append))
    assert [finding.name for finding in findings] == [question[0] for question in deep._QUESTIONS.values()]
    assert told == ["TensorRT for RTX builds a preflight"]
    assert findings[0].status == "ok", findings[0]
    assert "48 plugins" in findings[0].found
    assert {finding.found for finding in findings[1:]} == {"not tried: needs an NVIDIA GPU"}


def test_a_step_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last words, and how long it took; no answer in time is an answer."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    worked, said = deep.run_step("aot-without-python", tmp_path, 60)
    assert not worked
    assert said.endswith("s]")
    assert deep.run_step("preflight", tmp_path, 0.01) == (False, "no answer within 0 s")
    assert set(deep._QUESTIONS) == set(deep_steps.STEPS)
