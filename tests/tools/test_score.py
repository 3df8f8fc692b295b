"""`angelforge score`: logits at every position in a NumPy file that is whole or absent."""

import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from angelforge import LLM
from angelforge.errors import AngelForgeError
from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine
from angelforge.tools.cli import main

IDS = np.random.default_rng(0).integers(0, 1024, 300).tolist()  # more than one piece of rows


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> Path:
    """A small built bundle."""
    folder = tmp_path_factory.mktemp("score") / "bundle"
    for command in (["export", str(small_checkpoint), str(folder)], ["build", str(folder)]):
        assert CliRunner().invoke(main, command).exit_code == 0
    return folder


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """The file of ids."""
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    return tmp_path / "ids.json"


def score(bundle: Path, ids: Path, *more: object) -> Result:
    """`angelforge score` into logits.npy beside the ids."""
    output = ids.with_name("logits.npy")
    return CliRunner().invoke(main, ["score", *map(str, (bundle, "--tokens", ids, "--output", output, *more))])


def test_the_file_holds_the_logits_at_every_position(bundle: Path, ids: Path) -> None:
    result = score(bundle, ids)
    assert (result.exit_code, result.stderr) == (0, "")
    found = np.load(ids.with_name("logits.npy"))
    assert (found.shape, found.dtype) == ((300, 1024), np.float32)
    with LLM(bundle) as llm:
        np.testing.assert_array_equal(found, llm.score(IDS))
        following = int(found[:6].argmax(axis=1)[-1])
        assert llm.generate([IDS[:6]])[0].token_ids[0] == following


def test_json_says_what_was_written(bundle: Path, ids: Path) -> None:
    result = json.loads(score(bundle, ids, "--json").stdout)
    assert (result["output"], result["shape"]) == (str(ids.with_name("logits.npy")), [300, 1024])


def test_a_failure_leaves_the_old_file_and_nothing_else(bundle: Path, ids: Path, monkeypatch) -> None:
    old = ids.with_name("logits.npy")
    old.write_bytes(b"old")
    forward, calls = OnnxRuntimeEngine.forward, []

    def failing(engine, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise AngelForgeError("The device was lost.")
        return forward(engine, batch)

    monkeypatch.setattr(OnnxRuntimeEngine, "forward", failing)
    result = score(bundle, ids)
    assert (result.exit_code, result.stderr) == (1, "error: The device was lost.\n")
    assert old.read_bytes() == b"old"
    assert sorted(path.name for path in ids.parent.iterdir()) == ["ids.json", "logits.npy"]


def test_a_disk_that_is_too_small_is_told_before_the_work(bundle: Path, ids: Path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 300 * 1024 * 4))
    result = score(bundle, ids)
    assert result.exit_code == 1
    assert "The logits take 1.23 MB" in result.stderr
    assert not ids.with_name("logits.npy").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("[[1], [2]]", "holds 2 lists"), ("[]", "prompt is empty"), ("[1, 5000]", "has id 5000"), ("{}", "list of token")],
)
def test_wrong_ids_end_with_code_2(bundle: Path, ids: Path, content: str, message: str) -> None:
    ids.write_text(content)
    result = score(bundle, ids)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_context_that_is_too_short_names_both_numbers(bundle: Path, ids: Path) -> None:
    ids.write_text(json.dumps([1] * 513))
    assert "prompt has 513 tokens, but the context is 512" in score(bundle, ids).stderr
