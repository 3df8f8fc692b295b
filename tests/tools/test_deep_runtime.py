"""The steps of `doctor --deep` about engines at work say what is wrong; a CPU's tensors stand for a GPU's."""

import re

import numpy as np
import pytest

from angelforge.errors import AngelForgeError
from angelforge.tools import deep_runtime


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_runtime, "VOCABULARY", 3000)
    monkeypatch.setattr(deep_runtime, "_REPEATS", 1)


def test_sampling_agrees_with_the_host() -> None:
    text = deep_runtime.compare_sampling("cpu", 3)
    assert re.fullmatch(r"agrees with the host; 3 rows: greedy \d+ µs, top-k, top-p and penalty \d+ µs", text)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda sampler, logits, requests: np.zeros(3, np.int64), "greedy tokens differ"),
        (
            lambda sampler, logits, requests: logits.argmax(1).numpy() if requests[0].params.greedy else np.full(3, 7),
            "row 0 drew the token 7, which the rules exclude",
        ),
    ],
)
def test_wrong_tokens_are_seen(monkeypatch: pytest.MonkeyPatch, wrong: object, said: str) -> None:
    monkeypatch.setattr(deep_runtime, "sample", wrong)
    with pytest.raises(AngelForgeError, match=said):
        deep_runtime.compare_sampling("cpu", 3)
