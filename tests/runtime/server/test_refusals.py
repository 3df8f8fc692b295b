"""Whatever comes in: the status says whose fault it is, the body is an error as OpenAI's, and the server goes on."""

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.http_server import CALL, Running, served, wait_until

from angelforge.errors import AngelForgeError
from angelforge.runtime.llm import LLM
from angelforge.runtime.server import run

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
TEXT = {"Content-Type": "application/json"}


def check_error(answer: Any, status: int) -> dict[str, Any]:
    """The error of an answer, which has this status and the form of OpenAI's errors."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    assert "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {}, "prompt"),
        (COMPLETIONS, {"prompt": None}, "prompt"),
        (COMPLETIONS, {"prompt": ""}, None),
        (COMPLETIONS, {"prompt": []}, None),
        (COMPLETIONS, {"prompt": [[]]}, None),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt"),
        (COMPLETIONS, {"prompt": [1024]}, None),
        (COMPLETIONS, {"prompt": [2**63]}, "prompt"),
        (COMPLETIONS, {"prompt": [2**200]}, "prompt"),
        (COMPLETIONS, {"prompt": "\ud800"}, None),
        (COMPLETIONS, {"prompt": "a " * 600}, "prompt"),
        (COMPLETIONS, {"prompt": [5] * 513}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": -1}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": "many"}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "temperature": -1}, None),
        (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, "temperature"),
        (COMPLETIONS, {"prompt": "a", "top_p": 2}, None),
        (COMPLETIONS, {"prompt": "a", "n": 0}, "n"),
        (COMPLETIONS, {"prompt": "a", "n": 10**9}, "n"),
        (COMPLETIONS, {"prompt": ["a"] * 300}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "best_of": 2}, "best_of"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 1, "echo": True, "stream": True}, "stream"),
        (COMPLETIONS, {"prompt": "a", "stop": [""]}, None),
        (COMPLETIONS, {"prompt": "a", "stop": ["x"] * 99}, "stop"),
        (COMPLETIONS, {"prompt": "a", "stop": ["x", "y" * 4097]}, "stop"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"one": 1}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"5000": 1}}, None),
        (COMPLETIONS, {"prompt": "a", "presence_penalty": 3}, "presence_penalty"),
        (COMPLETIONS, {"prompt": "a", "temprature": 1}, "temprature"),
        (CHATS, {}, "messages"),
        (CHATS, {"messages": []}, "messages"),
        (CHATS, {"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
        (CHATS, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, None),
        (CHATS, {"messages": [{"role": "tool", "content": "a"}]}, "messages"),
        (CHATS, {"messages": [{"role": "user", "content": "a " * 600}]}, "messages"),
        (CHATS, {"messages": MESSAGES, "max_tokens": 0}, "max_tokens"),
        (CHATS, {"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
        (CHATS, {"messages": MESSAGES, "response_format": {"type": "xml"}}, "response_format.type"),
        (CHATS, {"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools.0.function"),
        (CHATS, {"messages": MESSAGES, "audio": {}}, "audio"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_requests_get_400(
    server: Running, path: str, body: dict[str, Any], param: str | None, stream: bool
) -> None:
    """As a stream too: the status comes before the first event."""
    content = json.dumps({"model": "toy", "stream": stream, **body})
    error = check_error(server.http.post(path, content=content, headers=TEXT), 400)
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"model": "toy", "prompt": NaN}', b"{}" * 3],
)
def test_malformed_bodies_get_400(server: Running, content: bytes) -> None:
    check_error(server.http.post(COMPLETIONS, content=content, headers=TEXT), 400)


@pytest.mark.parametrize(
    ("path", "body", "message", "param"),
    [
        (COMPLETIONS, {"stop": 5}, "stop: Input should be a valid string or a valid list.", "stop"),
        (COMPLETIONS, {"stop": ["a", 5]}, "stop.1: Input should be a valid string.", "stop.1"),
        (COMPLETIONS, {"temperature": True}, "temperature: Input should be a valid number.", "temperature"),
        (COMPLETIONS, {"presence_penalty": False}, "presence_penalty: Input should be a valid number.", None),
        (COMPLETIONS, {"top_k": True}, "top_k: Input should be a valid integer.", "top_k"),
        (COMPLETIONS, {"logit_bias": {"5": True}}, "logit_bias.5: Input should be a valid number.", "logit_bias.5"),
        (COMPLETIONS, {"stream": 1}, "stream: Input should be a valid boolean.", "stream"),
        (CHATS, {"tool_choice": {"type": "function"}}, "tool_choice.function: Field required.", "tool_choice.function"),
        (CHATS, {"tool_choice": 5}, None, "tool_choice"),
        (CHATS, {"reasoning_effort": "low"}, "reasoning_effort is not supported here; leave it out.", None),
        (COMPLETIONS, {"suffix": "a"}, "suffix is not supported here; leave it out.", "suffix"),
        (CHATS, {"messages": [{"role": "user", "content": 5}]}, None, "messages.0.content"),
        (CHATS, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, None, "messages.0.content.0.text"),
        (CHATS, {"messages": MESSAGES, "stream_options": {"usage": True}}, None, "stream_options.usage"),
    ],
)
def test_messages_name_fields_as_the_sender_does(
    server: Running, path: str, body: dict[str, Any], message: str | None, param: str | None
) -> None:
    """Of a field that may have several forms they tell what was meant, and never how the server has written it down."""
    error = check_error(
        server.post(path, {"prompt": "a"} | body if path == COMPLETIONS else {"messages": MESSAGES} | body), 400
    )
    assert message is None or error["message"] == message
    assert param is None or error["param"] == param
    for word in ("list[", "str]", "Part", "Named", "literal[", "function-", "body."):
        assert word not in error["message"]


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_without_its_type_is_told_which(server: Running, kind: str | None) -> None:
    """As `curl -d` sends it unless told otherwise."""
    headers = {} if kind is None else {"Content-Type": kind}
    answer = server.http.post(COMPLETIONS, content=json.dumps({"model": "toy", "prompt": "a"}), headers=headers)
    assert "`Content-Type: application/json`" in check_error(answer, 400)["message"]


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [("(", "unclosed group"), ("(?=a)b", "look-around, including look-ahead and look-behind, is not supported")],
)
def test_a_pattern_that_cannot_be_read(server: Running, pattern: str, reason: str) -> None:
    schema = {"type": "string", "pattern": pattern}
    error = check_error(server.post(CHATS, {"messages": MESSAGES} | fitting(schema)), 400)
    assert error["message"] == f"response_format cannot be followed: regex parse error: {reason}."


def test_prompts_are_not_in_error_messages(server: Running) -> None:
    for body in ({"prompt": ["secret", 5]}, {"prompt": "a", "stop": {"secret": "secret"}}, {"prompt": [["secret"]]}):
        assert "secret" not in server.post(COMPLETIONS, body).text


def test_unknown_paths_methods_and_models(server: Running) -> None:
    check_error(server.http.get("/v1/nothing"), 404)
    check_error(server.http.get(COMPLETIONS), 405)
    check_error(server.http.get("/v1/models/other"), 404)
    check_error(server.http.post(COMPLETIONS, json={"model": "other", "prompt": "a"}), 404)
    assert server.http.get("/v1/models/toy").json() == server.http.get("/v1/models").json()["data"][0]


def test_what_is_no_http(server: Running) -> None:
    """Garbage, and a client that leaves in the middle of its body: the server goes on."""
    for sent in (b"\x00\x01\x02\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"):
        with socket.create_connection(server.bound.getsockname()) as connection:
            connection.sendall(sent)
    assert server.http.get("/health").json() == {"status": "ok"}


@pytest.fixture(scope="module")
def guarded(toy: Path) -> Any:
    """A server that asks for a key, takes two requests at a time and bodies of a kilobyte."""
    with (
        LLM(toy, max_batch=2, threads=1) as llm,
        served(llm, api_key="secret-key", max_requests=2, max_body=1000) as running,
    ):
        running.http.headers["Authorization"] = "Bearer secret-key"
        yield running


def test_a_key_is_asked_for(guarded: Running) -> None:
    for value in (None, "secret-key", "Bearer wrong", "Bearer secret-ke", "Basic secret-key"):
        headers = {} if value is None else {"Authorization": value}
        for path in ("/v1/models", "/v1/nothing"):
            request = guarded.http.build_request("GET", path, headers=headers)
            if value is None:
                del request.headers["Authorization"]
            error = check_error(guarded.http.send(request), 401)
            assert error["code"] == "invalid_api_key"
    assert guarded.client("secret-key").models.list().data[0].id == "toy"
    assert "secret-key" not in repr(guarded.options)


def test_large_bodies_are_not_read(guarded: Running) -> None:
    """Announced or sent in pieces."""
    check_error(guarded.post(COMPLETIONS, {"prompt": "a" * 1000}), 413)

    def pieces() -> Any:
        for _ in range(64):
            yield b'{"prompt": "' + b"a" * 100

    check_error(guarded.http.post(COMPLETIONS, content=pieces(), headers=TEXT), 413)


def test_more_than_the_limit_is_refused(guarded: Running) -> None:
    """With 429 while others are open, with 400 if it alone is too much; afterwards all is as before."""
    check_error(guarded.post(COMPLETIONS, {"prompt": ["a", "b", "c"]}), 400)
    body = {"prompt": CALL, "n": 2, "max_tokens": 400, "ignore_eos": True, "stream": True, "model": "toy"}
    with guarded.http.stream("POST", COMPLETIONS, json=body) as stream:
        assert stream.status_code == 200
        answer = guarded.post(COMPLETIONS, {"prompt": "a"})
        check_error(answer, 429)
        assert answer.headers["retry-after"]
    wait_until(guarded.is_idle)
    assert guarded.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_prompt_that_the_cache_cannot_hold(toy: Path) -> None:
    with LLM(toy, num_pages=3, threads=1) as llm, served(llm) as running:
        check_error(running.post(COMPLETIONS, {"prompt": [5] * 200, "max_tokens": 100}), 400)
        assert running.post(COMPLETIONS, {"prompt": [5] * 20, "max_tokens": 10}).status_code == 200


def test_a_failing_engine(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed step ends its requests with 500, or with an event where a stream runs; the next request is served."""
    with LLM(toy, threads=1, speculate=0) as llm, served(llm) as running:
        engine, forward = llm.stepper.engine, llm.stepper.engine.forward
        fails, streams = [False] * 3 + [True], threading.Event()

        def failing(batch: Any) -> Any:
            if fails and fails.pop(0):
                assert streams.wait(30)
                raise AngelForgeError("The engine has failed.")
            return forward(batch)

        monkeypatch.setattr(engine, "forward", failing)
        body = {"prompt": CALL, "max_tokens": 50, "ignore_eos": True, "temperature": 0}
        with running.http.stream("POST", COMPLETIONS, json={"model": "toy", **body, "stream": True}) as stream:
            lines = stream.iter_lines()
            assert json.loads(next(lines)[6:])["choices"]
            streams.set()
            events = [line for line in lines if line]
        assert json.loads(events[-2][6:])["error"] == {
            "message": "The engine has failed.", "type": "server_error", "param": None, "code": None,
        }  # fmt: skip
        assert events[-1] == "data: [DONE]"
        assert running.http.get("/health").status_code == 200
        fails[:] = [True] * 3
        for _ in range(3):
            check_error(running.post(COMPLETIONS, body), 500)
        assert running.http.get("/health").json() == {"status": "failing"}
        assert running.post(COMPLETIONS, body).status_code == 200
        wait_until(lambda: running.http.get("/health").status_code == 200)
        assert running.is_idle()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_end_of_the_engines_thread(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug or a lack of memory: open requests end with an error, new ones get 503, and /health says so."""
    monkeypatch.setattr(run, "_ENGINE_GONE", 60.0)  # it says so until it is told to end
    with LLM(toy, threads=1) as llm, served(llm) as running:

        def dying(batch: Any) -> Any:
            raise MemoryError

        monkeypatch.setattr(llm.stepper.engine, "forward", dying)
        check_error(running.post(COMPLETIONS, {"prompt": "a"}), 500)
        check_error(running.post(COMPLETIONS, {"prompt": "a"}), 503)
        assert running.http.get("/health").json() == {"status": "ended"}


def test_a_client_that_reads_nothing(toy: Path) -> None:
    """A stream that fills the connection and is not read ends after a while, whatever of it is left."""
    with LLM(toy, threads=1) as llm, served(llm, stall_seconds=0.5) as running:
        body = {"model": "toy", "prompt": CALL, "n": 16, "max_tokens": 300, "ignore_eos": True, "stream": True}
        content = json.dumps(body | {"logprobs": 20}).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.connect(running.bound.getsockname())
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            wait_until(lambda: running.metric("requests_running") > 0)
            wait_until(running.is_idle)
            wait_until(lambda: running.server.service.open_requests == 0)
            wait_until(lambda: not running.server.server_state.tasks)


def deep_schema() -> dict[str, object]:
    """Lists in lists, 400 deep."""
    schema: dict[str, object] = {"type": "string"}
    for _ in range(400):
        schema = {"type": "array", "items": schema}
    return schema


def fitting(schema: dict[str, object]) -> dict[str, object]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"stop": "\ud800"}, "stop"),
        ({"stop": ["fine", "\udfff"]}, "stop"),
        (fitting({"const": "\ud800"}), "response_format"),
        (fitting(deep_schema()), "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "json_schema has no schema"),
    ],
)
def test_what_no_library_takes_is_the_senders_error(server: Running, fields: dict[str, object], told: str) -> None:
    """Half characters, and schemas that are nested too deeply or not there."""
    body = {"model": "toy", "max_tokens": 2, "messages": MESSAGES, **fields}
    error = check_error(server.http.post(CHATS, content=json.dumps(body).encode(), headers=TEXT), 400)
    assert told in error["message"] + str(error["param"])


def test_texts_far_beyond_the_context_are_not_tokenized(server: Running) -> None:
    """15 MB against 512 tokens: answered at once; tokenizing them would take a minute and gigabytes."""
    begin = time.monotonic()
    error = check_error(server.http.post(COMPLETIONS, json={"model": "toy", "prompt": "a b c " * 2_500_000}), 400)
    assert error["code"] == "context_length_exceeded"
    assert time.monotonic() - begin < 20
