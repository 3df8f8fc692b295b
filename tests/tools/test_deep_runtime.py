"""The steps of `doctor --deep` about engines at work say what is wrong; a CPU's tensors stand for a GPU's."""

import re

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


@pytest.mark.parametrize("wrong", ["greedy", "all rules"])
def test_wrong_tokens_are_seen(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    right = deep_runtime.sample

    def sample(sampler, logits, requests):
        tokens = right(sampler, logits, requests)
        tokens[1] += requests[0].params.greedy == (wrong == "greedy")
        return tokens

    monkeypatch.setattr(deep_runtime, "sample", sample)
    with pytest.raises(AngelForgeError, match=rf"{wrong}: row 1 gave the token \d+, on the host it gives \d+$"):
        deep_runtime.compare_sampling("cpu", 3)
