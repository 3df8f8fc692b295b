"""The requests of lm-eval-harness 0.4.13, model `local-completions`, read as it reads the answers.

It needs packages of half a gigabyte, so that tests send what it sends; docs/serving.md tells of runs of itself.
"""

from operator import itemgetter
from typing import Any

import numpy as np
import pytest
from support.http_server import Running

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
