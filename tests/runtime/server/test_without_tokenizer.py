"""A bundle without a tokenizer speaks in token ids; what needs a text is refused."""

from collections.abc import Iterator

import pytest
from support.http_server import Running, served
from support.paged_engine import PagedEngine

from angelforge.runtime.llm import LLM
from angelforge.runtime.sampling import SamplingParams


@pytest.fixture(scope="module")
def numbers() -> Iterator[Running]:
    with LLM.from_engine(PagedEngine(max_context=60), max_batch=4) as llm, served(llm) as running:
        yield running


def test_ids_in_ids_out(numbers: Running) -> None:
    body = {"prompt": [3, 5, 7], "max_tokens": 9, "temperature": 0, "return_token_ids": True, "logprobs": 1}
    answer = numbers.client().completions.create(model="toy", prompt=[3, 5, 7], max_tokens=9, temperature=0)
    assert answer.choices[0].text == ""
    (choice,) = numbers.post("/v1/completions", body).json()["choices"]
    alone = LLM.from_engine(PagedEngine(max_context=60)).generate([[3, 5, 7]], SamplingParams(max_tokens=9))
    assert tuple(choice["token_ids"]) == alone[0].token_ids
    assert choice["logprobs"]["tokens"] == [f"[{token}]" for token in choice["token_ids"]]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/completions", {"prompt": [3], "stop": ["a"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_texts_are_refused(numbers: Running, path: str, body: dict[str, object]) -> None:
    answer = numbers.post(path, body)
    assert answer.status_code == 400
    assert "no tokenizer" in answer.json()["error"]["message"]
