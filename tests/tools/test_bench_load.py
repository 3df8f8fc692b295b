"""`bench decode` and `bench serve` on the toy: figures with and without the draft, as table, JSON and page."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.http_server import build_toy, served

from angelforge.runtime.llm import LLM
from angelforge.tools.cli import main

SMALL = ("--concurrency", "1,3", "--requests", 4, "--threads", 1)


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy(tmp_path_factory.mktemp("toy"))


def test_decode_with_and_without_the_draft(toy: Path, tmp_path: Path) -> None:
    calls = tmp_path / "calls.jsonl"
    calls.write_text('{"question": "Hello, I have a cough. I have had it for 4 days. I am 34 years old."}\n')
    result = bench("decode", toy, *SMALL, "--dataset", calls, "--plot", tmp_path / "plot.html", "--json")
    assert result.exit_code == 0, result.stderr
    runs = json.loads(result.stdout)["runs"]
    assert [(run["concurrency"], run["drafted"]) for run in runs] == [(1, False), (3, False), (1, True), (3, True)]
    assert [run["output_tokens"] for run in runs[:2]] == [run["output_tokens"] for run in runs[2:]]
    assert all(run["tokens_per_second"] > 0 and run["first_token_ms"]["50"] > 0 for run in runs)
    assert all(run["limit_tokens_per_second"] is None for run in runs)  # of a CPU it is not known
    assert runs[2]["accepted_length"] > 1
    assert runs[2]["speedup"] == runs[2]["tokens_per_second"] / runs[0]["tokens_per_second"]
    assert "<svg" in (tmp_path / "plot.html").read_text()


def test_decode_of_random_tokens_as_a_table(toy: Path) -> None:
    result = bench("decode", toy, *SMALL, "--input-tokens", 9, "--output-tokens", 5, "--speculate", 0)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n 1 ") + result.stdout.count("\n 3 ") == 2


def test_serve_by_address(toy: Path) -> None:
    """Random tokens have the lengths that were asked for, whoever counts."""
    with LLM(toy, threads=1) as llm, served(llm) as running:
        result = bench("serve", running.url, *SMALL, "--input-tokens", 9, "--output-tokens", 5, "--json")
        assert result.exit_code == 0, result.stderr
        runs = json.loads(result.stdout)["runs"]
        assert [run["output_tokens"] for run in runs] == [20, 20]
        assert [run["prompt_tokens"] for run in runs] == [36, 36]
        assert running.is_idle()


def test_serve_a_bundle(toy: Path) -> None:
    """A server is started and ended for each figure's kind."""
    result = bench("serve", toy, "--concurrency", 2, "--requests", 3, "--output-tokens", 4, "--threads", 1, "--json")
    assert result.exit_code == 0, result.stderr
    assert [run["drafted"] for run in json.loads(result.stdout)["runs"]] == [False, True]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--concurrency", "0"),
        ("--concurrency", "1,,2"),
        ("--raw",),
        ("--requests", "0"),
        ("--dataset", "/not/there"),
        ("--plot", "curves.png"),
        ("--plot", "/not/there/curves.html"),
    ],
)
def test_wrong_options_are_told(toy: Path, arguments: tuple[str, ...]) -> None:
    result = bench("decode", toy, *arguments)
    assert result.exit_code in (1, 2)
    assert "rror" in result.stderr
    assert result.stdout == ""


def test_what_cannot_be_served(tmp_path: Path) -> None:
    assert bench("serve", tmp_path / "nothing").exit_code != 0
    result = bench("serve", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "Is the server running" in result.stderr
