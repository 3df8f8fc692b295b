"""Prompts and figures of the load benches, and a load on a server that fails."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.paged_engine import PagedEngine

from angelforge.config import ModelConfig
from angelforge.errors import AngelForgeError, UsageError
from angelforge.manifest import Manifest
from angelforge.precision import Precision
from angelforge.runtime.llm import LLM
from angelforge.targets import get_target
from angelforge.tools.load.curves import curves
from angelforge.tools.load.figures import Sample, summarize
from angelforge.tools.load.in_process import run_in_process
from angelforge.tools.load.limit import limit_of
from angelforge.tools.load.options import Asks, LoadOptions
from angelforge.tools.load.over_http import Address, run_over_http
from angelforge.tools.load.prompts import Ask, read_dataset, synthetic
from angelforge.tools.load.report import ratio, write_plot
from angelforge.tools.toy import MODEL


def test_datasets_are_asked_as_chats(tmp_path: Path) -> None:
    """The fields of HumanEval, GSM8K and MATH-500, and chats as they are; with --raw as plain text."""
    lines = [
        {"task_id": "HumanEval/0", "prompt": "def f():", "entry_point": "f"},
        {"question": "How many?", "answer": "#### 2"},
        {"problem": "Evaluate 1 + 1.", "solution": "2"},
        {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]},
    ]
    file = tmp_path / "calls.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    asks = read_dataset(file, 50, raw=False)
    assert [ask.messages[-1]["content"] for ask in asks] == ["def f():", "How many?", "Evaluate 1 + 1.", "Hi"]
    assert all(ask.max_tokens == 50 and not ask.ignore_eos for ask in asks)
    raw = read_dataset(file, 50, raw=True)
    assert [ask.text for ask in raw] == ["def f():", "How many?", "Evaluate 1 + 1.", None]
    again = Asks(LoadOptions((1,), file, False, 1, 50, 3, 0.0, None), vocab_size=100)
    assert [again.take(1), again.take(1)] == [asks[:3], [asks[3], *asks[:2]]]


def test_datasets_of_other_tools(tmp_path: Path) -> None:
    """A mark at the begin and CRLF, as Windows writes them; texts with the separators that end lines elsewhere."""
    text = "one\u2028two\u0085three"
    file = tmp_path / "windows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + 2 * f'{{"prompt": "{text}"}}\r\n'.encode())
    assert [ask.text for ask in read_dataset(file, 10, raw=True)] == [text, text]


@pytest.mark.parametrize("line", ["", "{", "[]", "{}", '{"prompt": 3}', '{"messages": []}', '{"messages": [1]}'])
def test_lines_that_cannot_be_asked_are_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n' if line else "\n")
    with pytest.raises(UsageError, match="line 2" if line else "no lines"):
        read_dataset(file, 10, raw=False)
    file.write_bytes(b"\xff\n")
    with pytest.raises(AngelForgeError, match="UTF-8"):
        read_dataset(file, 10, raw=False)


def test_synthetic_requests_have_the_asked_sizes_and_differ() -> None:
    asks = synthetic(5, 20, 7, 1000, seed=1)
    assert {len(ask.ids) for ask in asks} == {20}
    assert len({ask.ids for ask in asks}) == 5
    assert all(ask.max_tokens == 7 and ask.ignore_eos for ask in asks)
    assert all(0 <= token < 1000 for ask in asks for token in ask.ids)


def test_figures_count_everything() -> None:
    samples = [Sample(0.01 * i, [0.001 * j for j in range(1, 101)], 101, 10, 5) for i in range(1, 5)]
    plain = summarize(samples, 4, False, 2.0)
    assert (plain.output_tokens, plain.prompt_tokens, plain.cached_tokens) == (404, 40, 20)
    assert plain.tokens_per_second == 202
    assert plain.first_token_ms == pytest.approx({"50": 25.0, "90": 37.0, "99": 39.7})
    assert plain.between_tokens_ms == pytest.approx({"50": 50.5, "90": 90.1, "99": 99.01}, rel=0.02)
    drafted = summarize(samples, 4, True, 1.0, 2.5)
    assert ratio(drafted, [plain, drafted]) == 2
    assert ratio(plain, [plain, drafted]) is None
    assert summarize([Sample(0.1, [], 1, 1)], 1, False, 1.0).between_tokens_ms is None


def test_so_many_run_at_once_and_all_are_asked() -> None:
    """Also where requests end at different times; what the engine gives is what the samples count."""
    engine, told = PagedEngine(max_context=60), []
    with LLM.from_engine(engine, max_batch=3) as llm:
        asks = [Ask(ids=(3, index), max_tokens=5 + index) for index in range(10)]
        samples, seconds = run_in_process(llm, asks, 3, 0.0, lambda ended, count: told.append((ended, count)))
    assert max(sequences for _, sequences in engine.batches) == 3
    assert [sample.tokens for sample in samples] == list(range(5, 15))
    assert all(len(sample.gaps) == sample.tokens - 1 and sample.first > 0 for sample in samples)
    assert sum(sample.first + sum(sample.gaps) for sample in samples) <= 3 * seconds
    assert told == [(ended, 10) for ended in range(1, 11)]


def test_a_request_that_fails_ends_the_bench() -> None:
    engine = PagedEngine(max_context=60)
    with LLM.from_engine(engine, max_batch=3) as llm:
        engine.fail_with = "It has failed."
        with pytest.raises(AngelForgeError, match=r"Request 0 has failed: It has failed\."):
            run_in_process(llm, [Ask(ids=(3,), max_tokens=5)], 1, 0.0, lambda ended, count: None)


def test_the_limit_is_that_of_the_target() -> None:
    config = ModelConfig.load(MODEL)
    manifest = Manifest("test", config, Precision.BF16, 64, 512, {}, {}, "packed", {}, None)
    samples = [Sample(0.1, [], 20, 100)]
    assert limit_of(manifest, get_target("cpu"), 1, samples) is None
    one, many = (limit_of(manifest, get_target("h200"), batch, samples) for batch in (1, 8))
    assert one is not None
    assert many is not None
    assert one < many < 8 * one


def test_a_plot_needs_nothing_else(tmp_path: Path) -> None:
    found = [summarize([Sample(0.1, [0.01], 2, 5)], clients, drafted, 1.0) for clients in (1, 8) for drafted in (0, 1)]
    write_plot(tmp_path / "plot.html", found, "A <title>")
    page = (tmp_path / "plot.html").read_text()
    assert page.count("<svg") == 3
    assert page.count("<tr>") == 5
    assert "A &lt;title&gt;" in page
    assert "http" not in page
    assert "script" not in page
    assert curves([]) == ""


class Refusing(BaseHTTPRequestHandler):
    """Answers as the path says: a status, a stream that breaks off, or no HTTP."""

    def do_POST(self) -> None:
        kind = self.path.split("/")[1]
        if kind == "error":
            self.send_response(429)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "Too much."}}')
        elif kind == "garbage":
            self.wfile.write(b"\x00\x00\r\n")
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'data: {"error": {"message": "It broke."}}\n\n' if kind == "event" else b"data: {\n\n")

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def refusing() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("path", "told"),
    [("error", "429: Too much"), ("garbage", "does not answer"), ("event", "It broke"), ("cut", "broke off")],
)
def test_a_failing_server_is_told(refusing: str, path: str, told: str) -> None:
    with pytest.raises(AngelForgeError, match=told):
        run_over_http(Address(f"{refusing}/{path}", "m"), [Ask(text="a")] * 3, 2, 0.0, lambda ended, count: None)


@pytest.mark.parametrize("url", ["ftp://a", "http://", "http:/x"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError, match="no address"):
        Address(url).connect()


def test_nobody_listens() -> None:
    with pytest.raises(AngelForgeError, match="Is the server running"):
        Address("http://127.0.0.1:9").first_model()
