"""`angelforge run`: prompts, ids and chats on a built bundle; what is wrong is told in a sentence."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from angelforge import LLM, SamplingParams
from angelforge.runtime import tensorrt_loading
from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine
from angelforge.tools.cli import main


def run(*arguments: object, lines: str | None = None) -> Result:
    """`angelforge run` with these arguments."""
    return CliRunner().invoke(main, ["run", *map(str, arguments)], input=lines)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> Path:
    """A small built bundle with tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("run") / "bundle"
    for command in (["export", str(small_checkpoint), str(folder)], ["build", str(folder)]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def llm(bundle: Path) -> LLM:
    """The same bundle from Python."""
    return LLM(bundle)


def test_the_printed_text_is_the_one_that_python_gives(bundle: Path, llm: LLM) -> None:
    result = run(bundle, "--prompt", "The patient", "--max-tokens", 12, "--ignore-eos")
    (output,) = llm.generate(["The patient"], SamplingParams(max_tokens=12, ignore_eos=True))
    assert (result.exit_code, result.stdout, result.stderr) == (0, output.text + "\n", "")


def test_several_prompts_are_printed_in_their_order(bundle: Path, llm: LLM) -> None:
    prompts = ["a", "the doctor and the nurse", "b"]
    result = run(bundle, *(part for prompt in prompts for part in ("--prompt", prompt)), "--max-tokens", 6)
    outputs = llm.generate(prompts, SamplingParams(max_tokens=6))
    assert result.stdout == "".join(f"--- {i} of 3\n{output.text}\n" for i, output in enumerate(outputs, 1))


def test_sampling_options_reach_the_model(bundle: Path, llm: LLM) -> None:
    options = {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 3}
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = run(bundle, "--prompt", "x", "--max-tokens", 20, *arguments, "--json")
    (output,) = llm.generate(["x"], SamplingParams(max_tokens=20, **options))
    assert json.loads(result.stdout)[0]["token_ids"] == list(output.token_ids)
    stop = output.text[5:8]
    result = run(bundle, "--prompt", "x", "--max-tokens", 20, *arguments, "--stop", "never", "--stop", stop)
    assert result.stdout == output.text.split(stop)[0] + "\n"


def test_options_that_choose_nothing_are_told(bundle: Path) -> None:
    """The default temperature draws no token: who gives --top-p alone must not believe that it was sampled."""
    common = [bundle, "--prompt", "The patient", "--max-tokens", 2, "--top-p", 0.5, "--seed", 3]
    idle, used = run(*common), run(*common, "--temperature", 1)
    assert (idle.exit_code, used.exit_code, used.stderr) == (0, 0, "")
    assert idle.stderr.startswith("note: --top-p, --seed: of no use at temperature 0")


def test_penalties_and_logprobs_reach_the_model(bundle: Path, llm: LLM) -> None:
    options = {"presence_penalty": 1.5, "frequency_penalty": 0.7, "logprobs": 2}
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = run(bundle, "--prompt", "x", "--max-tokens", 9, *arguments, "--json")
    (output,) = llm.generate(["x"], SamplingParams(max_tokens=9, **options))
    (found,) = json.loads(result.stdout)
    assert found["token_ids"] == list(output.token_ids)
    assert output.logprobs is not None
    assert [each["token"] for each in found["logprobs"]] == list(output.token_ids)
    assert found["logprobs"][0]["logprob"] == pytest.approx(output.logprobs[0].logprob)
    assert len(found["logprobs"][0]["top"]) == 2
    result = run(bundle, "--prompt", "x", "--logprobs", 2)
    assert (result.exit_code, "--json only" in result.stderr) == (2, True)


@pytest.mark.parametrize(("content", "prompts"), [("[5, 6, 7]", [[5, 6, 7]]), ("[[5], [6, 7]]", [[5], [6, 7]])])
def test_files_of_token_ids(bundle: Path, llm: LLM, tmp_path: Path, content: str, prompts: list[list[int]]) -> None:
    (tmp_path / "ids.json").write_text(content)
    result = run(bundle, "--tokens", tmp_path / "ids.json", "--max-tokens", 5, "--json")
    outputs = llm.generate(prompts, SamplingParams(max_tokens=5))
    found = json.loads(result.stdout)
    assert [each["token_ids"] for each in found] == [list(output.token_ids) for output in outputs]
    assert [each["prompt_token_ids"] for each in found] == prompts
    assert [each["finish_reason"] for each in found] == ["length"] * len(prompts)


def test_a_bundle_without_tokenizer_prints_ids(bundle: Path, llm: LLM, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("angelforge.runtime.llm.Tokenizer.load", lambda folder: None)
    (tmp_path / "ids.json").write_text("[5]")
    result = run(bundle, "--tokens", tmp_path / "ids.json", "--max-tokens", 3)
    (output,) = llm.generate([[5]], SamplingParams(max_tokens=3))
    assert result.stdout.split() == [str(token) for token in output.token_ids]
    result = run(bundle, "--chat", lines="Hi\n")
    assert (result.exit_code, result.stderr) == (
        2,
        "error: The bundle has no tokenizer, so it cannot chat. Use prompts instead.\n",
    )


def test_one_bad_prompt_is_told_and_the_others_are_printed(bundle: Path) -> None:
    result = run(bundle, "--prompt", "a", "--prompt", "", "--max-tokens", 2)
    assert result.exit_code == 1
    assert result.stderr == "error: prompt 2 of 2: The prompt is empty, but at least one token is needed.\n"
    assert result.stdout.count("--- ") == 2
    result = run(bundle, "--prompt", "a", "--prompt", "", "--max-tokens", 2, "--json")
    assert result.exit_code == 1
    assert [each["finish_reason"] for each in json.loads(result.stdout)] == ["length", "error"]


def test_a_prompt_longer_than_the_context_names_both_numbers(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text(json.dumps([5] * 513))
    result = run(bundle, "--tokens", tmp_path / "ids.json")
    assert "The prompt has 513 tokens, but the context is 512." in result.stderr


def test_a_chat_keeps_its_history_and_its_system_message(bundle: Path, llm: LLM) -> None:
    params = SamplingParams(max_tokens=8)
    result = run(bundle, "--chat", "--system", "Be brief", "--max-tokens", 8, lines="Hi\n\nWhy?\n/reset\nWhy?\n")
    talk = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    first = llm.chat(talk, params).text
    talk += [{"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    second = llm.chat(talk, params).text
    anew = llm.chat([talk[0], talk[-1]], params).text
    assert second != anew
    assert (result.exit_code, result.stdout) == (0, f"{first}\n{second}\n{anew}\n")


def test_a_chat_survives_a_message_that_is_too_long(bundle: Path, llm: LLM) -> None:
    result = run(bundle, "--chat", "--max-tokens", 4, lines="Hi\n" + "z?" * 600 + "\nWhy?\n")
    assert "but the context is 512" in result.stderr
    assert "/reset" in result.stderr
    assert result.exit_code == 0
    params = SamplingParams(max_tokens=4)
    talk = [{"role": "user", "content": "Hi"}]
    talk += [{"role": "assistant", "content": llm.chat(talk, params).text}, {"role": "user", "content": "Why?"}]
    assert result.stdout.endswith(llm.chat(talk, params).text + "\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Say what to run"),
        (["--prompt", "x", "--chat"], "only one of them"),
        (["--prompt", "x", "--system", "y"], "--system is for --chat"),
        (["--chat", "--json"], "--chat is for people"),
        (["--prompt", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens is 0"),
        (["--prompt", "x", "--target", "z80"], "no target 'z80'"),
        (["--prompt", "x", "--kv-memory-gb", "0"], "--kv-memory-gb is 0"),
        (["--prompt", "x", "--kv-memory-gb", "1e-6"], "KV cache hold 0 pages"),
        (["--prompt", "x", "--max-batch", "5000"], "max_tokens_per_step is 1024"),
        (["--prompt", "x", "--threads", "0"], "threads"),
    ],
)
def test_wrong_use_ends_with_code_2_and_a_sentence(bundle: Path, arguments: list[str], message: str) -> None:
    result = run(bundle, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_target_that_cannot_run_here_is_told(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing, and what to do; code 1, since it is the machine."""
    monkeypatch.setattr(tensorrt_loading, "find_gpu", lambda index: None)
    result = run(bundle, "--prompt", "x", "--target", "h20")
    assert result.exit_code == 1
    assert "Target h20 cannot run on this machine: no NVIDIA GPU with a working driver was found" in result.stderr
    assert "angelforge doctor" in result.stderr


@pytest.mark.parametrize("content", ["", "{", "3", '"x"', "[1, [2]]", "[1.5]", "[true]", '["1"]', "[" * 10**5, "\xff"])
def test_files_that_are_no_token_ids_are_named(bundle: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "ids.json").write_text(content, encoding="latin-1")
    result = run(bundle, "--tokens", tmp_path / "ids.json")
    assert result.exit_code == 2
    assert "ids.json" in result.stderr
    assert run(bundle, "--tokens", tmp_path / "none.json").exit_code == 1


def test_a_bundle_that_was_not_built_says_how(tmp_path: Path, small_checkpoint: Path) -> None:
    CliRunner().invoke(main, ["export", str(small_checkpoint), str(tmp_path / "bundle"), "--graph-only"])
    result = run(tmp_path / "bundle", "--prompt", "x")
    assert result.exit_code == 1
    assert "angelforge export" in result.stderr or "angelforge build" in result.stderr


def test_an_interrupt_in_mid_output_ends_the_line_and_the_command(bundle: Path, monkeypatch) -> None:
    forward, calls = OnnxRuntimeEngine.forward, []

    def interrupted(engine, batch):
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(engine, batch)

    monkeypatch.setattr(OnnxRuntimeEngine, "forward", interrupted)
    result = run(bundle, "--prompt", "The patient", "--ignore-eos")
    assert result.exit_code == 130
    assert result.stdout.endswith("\n")
    assert result.stderr == "interrupted\n"


def test_control_c_in_a_chat_ends_with_code_130_and_no_traceback(bundle: Path) -> None:
    command = [sys.executable, "-m", "angelforge.tools", "run", str(bundle), "--chat", "--max-tokens", "2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"Hi\n")
        process.stdin.flush()
        process.stdout.readline()  # it has answered and waits for the next line
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(120) == 130
        assert process.stderr.read() == b"interrupted\n"


def test_text_that_the_terminal_cannot_show_does_not_stop_the_output(bundle: Path) -> None:
    command = [sys.executable, "-m", "angelforge.tools", "run", str(bundle), "--prompt", "患者", "--max-tokens", "40"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?" in done.stdout
