"""`angelforge bench host` runs the real stepper, and says for each batch what a step costs beside the engine."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from angelforge.tools.cli import main
from angelforge.tools.host_work import VOCAB, NoEngine, synthetic_tokenizer


def test_each_batch_is_told() -> None:
    arguments = ["bench", "host", "--batch", "1", "--batch", "3", "--steps", "10", "--prompt", "70"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(row["batch"], row["goal"]) for row in rows] == [(1, 200.0), (3, None)]
    for row in rows:
        assert 0 < row["launch"] + row["ask"] < row["host"] <= row["slow"]
        assert row["least"] <= row["host"] < row["all"]
        assert row["all"] == pytest.approx(row["host"] + row["calls"])
        assert row["launch"] < row["idle"] < row["host"]
        assert min(row["numpy"], row["bound"]) > 0
    result = CliRunner().invoke(main, arguments)
    assert "NumPy sampling" in result.stdout


def test_the_tokenizer_is_as_large_as_the_models_and_gives_text() -> None:
    tokenizer = synthetic_tokenizer()
    assert len(tokenizer.special_ids) == 1
    assert max(tokenizer.special_ids) == VOCAB - 1
    for token in (300, 5000, VOCAB - 2):
        assert 2 <= len(tokenizer.decode([token])) <= 9


@pytest.mark.parametrize("value", ["0", "257"])
def test_batches_that_make_no_sense_are_refused(value: str) -> None:
    assert CliRunner().invoke(main, ["bench", "host", "--batch", value]).exit_code == 2


def test_logits_lie_in_memory_already() -> None:
    for on_host, kind in ((True, np.ndarray), (False, torch.Tensor)):
        engine = NoEngine(2, 4096, on_host)
        assert isinstance(engine.logits, kind)
        assert engine.logits.shape == (2, VOCAB)
        assert engine.bound > 0
        engine.close()
