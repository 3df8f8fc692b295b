"""lm-eval-harness 0.4.13, model `local-completions`: what it sends, read as it reads it, and the harness itself.

It needs packages of half a gigabyte, so that only the long tests run it; the others send what it sends.
"""

import json
import os
import subprocess
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.http_server import Running

from angelforge.runtime.llm import LLM
from angelforge.runtime.sampling import SamplingParams
from angelforge.runtime.validate.reference import load_reference
from angelforge.tools.toy import MODEL

# (context, the choices, which of them is right): multiple choice is a comparison of log likelihoods
TASK = [
    ("Hello, I have a", (" cough.", " lamp."), 0),
    ("I am 34 years", (" old.", " cough."), 0),
    ("I have had it for 4", (" ankle.", " days."), 1),
    ("Please call an", (" ambulance", " days"), 0),
]


def payload(tokens: list[list[int]]) -> dict[str, Any]:
    """A request for log likelihoods; several prompts where its batch size is above 1."""
    return {"prompt": tokens, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}


def parse(answer: dict[str, Any], context_lengths: list[int]) -> list[tuple[float, bool]]:
    """(log likelihood of the continuation, whether it is the greedy one) of each prompt."""
    found = []
    for choice, length in zip(sorted(answer["choices"], key=itemgetter("index")), context_lengths, strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][length:-1]
        best = choice["logprobs"]["top_logprobs"][length:-1]
        found.append((sum(logprobs), all(own == max(top.values()) for own, top in zip(logprobs, best, strict=True))))
    return found


@pytest.mark.parametrize("batch", [1, 8])
def test_log_likelihoods_are_the_models(server: Running, batch: int) -> None:
    encode = server.llm.tokenizer.encode
    pairs = [(encode(context), encode(choice)) for context, choices, _ in TASK for choice in choices]
    found = []
    for begin in range(0, len(pairs), batch):
        some = pairs[begin : begin + batch]
        answer = server.post("/v1/completions", payload([context + choice for context, choice in some]))
        assert answer.status_code == 200
        found += parse(answer.json(), [len(context) for context, _ in some])
    reference = load_reference(MODEL)
    for (context, choice), (likelihood, greedy) in zip(pairs, found, strict=True):
        logits = reference.logits(np.array(context + choice))[len(context) - 1 : -1].astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert likelihood == pytest.approx(logs[np.arange(len(choice)), choice].sum(), abs=1e-2)
        assert greedy == (logits.argmax(-1) == choice).all()
    likelihoods = np.array([likelihood for likelihood, _ in found]).reshape(-1, 2)
    assert likelihoods.argmax(1).tolist() == [right for _, _, right in TASK]


def test_generations_stop_where_the_task_says(server: Running) -> None:
    """The other kind of task: text until one of several strings."""
    stops = ["<|endoftext|>", "."]
    body = {"prompt": ["Hello, I have a"], "max_tokens": 40, "temperature": 0, "stop": stops, "seed": 1234}
    (choice,) = server.post("/v1/completions", body).json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["text"]
    assert "." not in choice["text"]


TASKS = Path(__file__).with_name("lm_eval")


def examples(task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / f"{task}.jsonl").read_text().splitlines()]


def harness(server: Running, toy: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """What lm-eval-harness finds, by task: its results, and under "samples" each example's."""
    arguments = f"model={server.options.model},base_url={server.url}/v1/completions,tokenizer={toy},num_concurrent=4"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
    command += [
        "--include_path",
        str(TASKS),
        "--tasks",
        "angelforge_choices,angelforge_generations",
        "--batch_size",
        "2",
    ]
    command += ["--output_path", str(folder / "found"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder), "OPENAI_API_KEY": "none"}
    ran = subprocess.run(command, cwd=TASKS, env={**os.environ, **offline}, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    (results,) = (folder / "found").rglob("results_*.json")
    found: dict[str, dict[str, Any]] = json.loads(results.read_text())["results"]
    for task, told in found.items():
        (samples,) = (folder / "found").rglob(f"samples_{task}_*.jsonl")
        told["samples"] = sorted(map(json.loads, samples.read_text().splitlines()), key=itemgetter("doc_id"))
    return found


@pytest.mark.full
def test_the_harness_finds_what_the_model_says(server: Running, toy: Path, tmp_path: Path) -> None:
    """Log likelihoods, scores and texts are those of the engine without the server."""
    found = harness(server, toy, tmp_path)
    with LLM(toy, threads=1) as llm:
        check(found, llm)


def check(found: dict[str, dict[str, Any]], llm: LLM) -> None:
    assert llm.tokenizer is not None
    encode = llm.tokenizer.encode
    choices, right, right_by_length = examples("choices"), 0, 0
    for example, sample in zip(choices, found["angelforge_choices"]["samples"], strict=True):
        likelihoods = []
        for choice, told in zip(example["choices"], sample["filtered_resps"], strict=True):
            context, whole = encode(example["context"]), encode(example["context"] + choice)
            logits = llm.score(whole)[len(context) - 1 : -1].astype(np.float64)
            logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            likelihoods.append(logs[np.arange(len(logits)), whole[len(context) :]].sum())
            assert float(told[0]) == pytest.approx(likelihoods[-1], abs=1e-3)
            assert (str(told[1]) == "True") == (logits.argmax(-1) == whole[len(context) :]).all()
        right += int(np.argmax(likelihoods)) == example["right"]
        lengths = [len(choice) for choice in example["choices"]]
        right_by_length += int(np.argmax(np.array(likelihoods) / lengths)) == example["right"]
    assert found["angelforge_choices"]["acc,none"] == right / len(choices)
    assert found["angelforge_choices"]["acc_norm,none"] == right_by_length / len(choices)
    assert 0 < right < len(choices)  # the last one's answer is wrong on purpose
    said = examples("generations")
    params = SamplingParams(max_tokens=24, stop=(".",))
    texts = [output.text for output in llm.generate([example["context"] for example in said], params)]
    assert [sample["filtered_resps"][0] for sample in found["angelforge_generations"]["samples"]] == texts
    exact = sum(text == example["answer"] for text, example in zip(texts, said, strict=True))
    assert found["angelforge_generations"]["exact_match,none"] == exact / len(said)
