"""`angelforge bench host` runs the real stepper, and says for each batch what a step costs beside the engine."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from angelforge.runtime.batch import Batch, Int64
from angelforge.runtime.device_kernels import Launch
from angelforge.runtime.tensorrt_runner import Runner
from angelforge.tools.cli import main
from angelforge.tools.empty_draft import Script
from angelforge.tools.host_work import VOCAB, NoEngine, measure, synthetic_tokenizer


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor interpreted, as kernels are in this process."""
    monkeypatch.setattr(Launch, "__call__", lambda self, grid, *arguments: None)


def test_each_batch_is_told() -> None:
    arguments = ["bench", "host", "--batch", "1", "--batch", "3", "--steps", "10", "--prompt", "70"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(row["batch"], row["goal"]) for row in rows] == [(1, 200.0), (3, None)]
    for row in rows:
        assert (row["proposals"], row["tokens"], row["draft"]) == (0, row["batch"], None)
        assert 0 < row["launch"] + row["ask"] < row["host"] <= row["slow"]
        assert row["least"] <= row["host"]
        assert row["launch"] < row["idle"] < row["host"]
        assert min(row["numpy"], row["bound"]) > 0
    result = CliRunner().invoke(main, arguments)
    assert "NumPy sampling" in result.stdout


@pytest.mark.parametrize("depth", [1, 3])
def test_with_a_draft_every_proposal_comes_out(depth: int) -> None:
    """What the draft takes is part of what the GPU waits for; the case without one stands beside it."""
    arguments = ["bench", "host", "--batch", "1", "--batch", "3", "--steps", "10", "--prompt", "70"]
    result = CliRunner().invoke(main, [*arguments, "--speculate", str(depth), "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    told = [(row["batch"], row["proposals"], row["tokens"], row["goal"]) for row in rows]
    drafted = [(batch, depth, batch * (1 + depth), None) for batch in (1, 3)]
    assert told == [(1, 0, 1, 200.0), drafted[0], (3, 0, 3, None), drafted[1]]
    for row in rows[1::2]:
        assert 0 < row["draft"] < row["idle"] < row["host"]
        assert row["numpy"] is None


def test_every_step_with_a_draft_is_a_captured_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of target and draft: the first call after a check, and those of one token each; 1 + 3 runs a step."""
    seen: list[tuple[int, int, bool]] = []
    real = Runner.run

    def run(self: Runner, batch: Batch, rows: Int64 | None = None) -> None:
        seen.append((batch.input_ids.shape[0], batch.logit_indices.shape[0], self._buckets.choose(batch)[1]))
        real(self, batch, rows)

    monkeypatch.setattr(Runner, "run", run)
    found = measure(2, 10, 80, on_host=False, depth=3)
    assert seen[-40:] == [(8, 8, True), (8, 2, True), (2, 2, True), (2, 2, True)] * 10
    assert found.tokens == [8] * 10
    assert len(found.drafts) == 10


@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 2**16))
def test_a_script_says_what_it_will_draw(requests: int, depth: int, before: int) -> None:
    """Ids below the vocabulary, wherever the script stands."""
    script = Script(300, 1 + depth)
    script.draw(before)
    proposed = np.stack([script.propose(requests, place) for place in range(1 + depth)], 1)
    drawn = script.draw(requests * (1 + depth))
    assert drawn.shape == (requests * (1 + depth),)
    assert proposed.ravel().tolist() == drawn.tolist()
    assert 256 <= drawn.min() <= drawn.max() < 300


def test_the_tokenizer_is_as_large_as_the_models_and_gives_text() -> None:
    tokenizer = synthetic_tokenizer()
    assert len(tokenizer.special_ids) == 1
    assert max(tokenizer.special_ids) == VOCAB - 1
    for token in (300, 5000, VOCAB - 2):
        assert 2 <= len(tokenizer.decode([token])) <= 9


@pytest.mark.parametrize("asked", ["--batch 0", "--batch 257", "--speculate -1", "--speculate auto"])
def test_what_makes_no_sense_is_refused(asked: str) -> None:
    assert CliRunner().invoke(main, ["bench", "host", *asked.split()]).exit_code == 2


def test_logits_lie_in_memory_already() -> None:
    for on_host, kind in ((True, np.ndarray), (False, torch.Tensor)):
        engine = NoEngine(2, 4096, on_host)
        assert isinstance(engine.logits, kind)
        assert engine.logits.shape == (2, VOCAB)
        assert engine.bound > 0
        engine.close()
