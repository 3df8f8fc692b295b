"""Drafts on the command line: exported, built, inspected and used; what is wrong is told in a sentence."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from angelforge.exporter.synthetic_draft import write_draft
from angelforge.tools.cli import main
from angelforge.tools.toy import DRAFT, MODEL

CALL = "Hello, I have a cough. I have had it for 4 days. I am 34 years old."


def angelforge(*arguments: object, lines: str | None = None) -> Result:
    """`angelforge` with these arguments."""
    return CliRunner().invoke(main, list(map(str, arguments)), input=lines)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with its draft, exported and built."""
    folder = tmp_path_factory.mktemp("speculate") / "bundle"
    result = angelforge("export", MODEL, folder, "--draft", DRAFT, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["draft"]["capture_layers"] == [0, 2, 3]
    assert angelforge("build", folder).exit_code == 0
    return folder


def test_tokens_are_the_same_with_and_without(bundle: Path) -> None:
    """--json has the report of each prompt, standard error that of all."""
    prompts = ("--prompt", CALL, "--prompt", f"Yes. {CALL}", "--ignore-eos")
    arguments = ("run", bundle, *prompts, "--max-tokens", 24, "--json", "--speculate")
    drafted, plain = angelforge(*arguments, 4), angelforge(*arguments, 0)
    with_draft, without = json.loads(drafted.stdout), json.loads(plain.stdout)
    assert [output["token_ids"] for output in with_draft] == [output["token_ids"] for output in without]
    assert [output["speculation"] for output in without] == [None, None]
    assert "draft" not in plain.stderr
    for output in with_draft:
        report = output["speculation"]
        assert report["target_calls"] <= len(output["token_ids"])
        assert len(report["acceptance_by_position"]) == 4
    assert "tokens a round" in drafted.stderr
    assert "accepted by position" in drafted.stderr


def test_a_bundle_with_a_draft_uses_it(bundle: Path) -> None:
    result = angelforge("run", bundle, "--chat", "--max-tokens", 40, lines=f"{CALL}\n")
    assert result.exit_code == 0
    assert "tokens a round" in result.stderr


@pytest.mark.parametrize(("depth", "code"), [("-1", 2), ("often", 2), ("1.5", 2), ("99", 2), ("", 2)])
def test_senseless_depths_are_refused(bundle: Path, depth: str, code: int) -> None:
    result = angelforge("run", bundle, "--prompt", "a", "--speculate", depth)
    assert (result.exit_code, result.stdout) == (code, "")
    assert "is needed" in result.stderr


def test_a_bundle_without_a_draft_has_none_to_use(tmp_path: Path) -> None:
    angelforge("export", MODEL, tmp_path / "bundle")
    angelforge("build", tmp_path / "bundle")
    result = angelforge("run", tmp_path / "bundle", "--prompt", "a", "--speculate", 3)
    assert result.exit_code == 1
    assert "--draft" in result.stderr
    assert angelforge("run", tmp_path / "bundle", "--prompt", "a", "--max-tokens", 2).stderr == ""


def test_inspect_names_the_draft(bundle: Path) -> None:
    assert "512 tokens, states after layers 0, 2, 3 of the model, in bf16" in " ".join(
        angelforge("inspect", bundle).stdout.split()
    )
    assert "draft" in json.loads(angelforge("inspect", bundle, "--json").stdout)["graphs"]


def test_a_draft_of_another_model_is_refused(tmp_path: Path, small_checkpoint: Path) -> None:
    draft = write_draft(tmp_path / "draft", small_checkpoint)
    result = angelforge("export", MODEL, tmp_path / "bundle", "--draft", draft)
    assert result.exit_code == 1
    assert "made for another model" in result.stderr
    assert not (tmp_path / "bundle").exists()


def test_notes_on_the_draft_are_told(tmp_path: Path, small_checkpoint: Path) -> None:
    """That its training was shorter than the stretched context; what quantising it lost."""
    draft = write_draft(tmp_path / "draft", small_checkpoint)
    arguments = ("--precision", "fp8", "--rope-scaling", "yarn:4")
    result = angelforge("export", small_checkpoint, tmp_path / "bundle", "--draft", draft, *arguments)
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "bundle/quantization.json").read_text())["kinds"]["draft"]["clipped"] == 0
    assert "names 512 positions, the target covers 2048" in result.stderr
