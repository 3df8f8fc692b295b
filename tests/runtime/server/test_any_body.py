"""Whatever JSON is sent, the answer is an answer or the sender's error, and never the server's."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from support.http_server import Running

from angelforge.runtime.server.schemas import ChatRequest, CompletionRequest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
# Values that are nearly right reach further than random ones.
NEARLY = JSON | st.sampled_from(
    [0, 1, 2, -1, 0.5, "a", ["a"], [5, 6], [[5]], {"5": 1}, {"type": "json_object"}, {"include_usage": True},
     {"type": "json_schema", "json_schema": {"schema": {"type": "array"}}}, [{"role": "user", "content": "a"}],
     [{"type": "function", "function": {"name": "f"}}], "auto", "required", True]
)  # fmt: skip


def bodies(fields: Any, required: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(sorted(fields)), NEARLY, max_size=4).map(
        lambda some: {"model": "toy", "max_tokens": 2} | required | some
    )


def check(server: Running, path: str, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    answer = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404), (body, answer.text)
    if answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
        assert '"error"' not in answer.text
    else:
        assert set(answer.json()) >= ({"choices", "usage"} if answer.status_code == 200 else {"error"})


@given(bodies(CompletionRequest.model_fields, {"prompt": "a"}))
def test_completions(server: Running, body: dict[str, Any]) -> None:
    check(server, "/v1/completions", body)


@given(bodies(ChatRequest.model_fields, {"messages": [{"role": "user", "content": "a"}]}))
def test_chats(server: Running, body: dict[str, Any]) -> None:
    check(server, "/v1/chat/completions", body)


@given(bodies(ChatRequest.model_fields, {"messages": [{"role": "user", "content": "a"}]}))
def test_chats_with_tools(tool_server: Running, body: dict[str, Any]) -> None:
    check(tool_server, "/v1/chat/completions", body)
