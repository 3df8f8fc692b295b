"""/metrics counts what happened, in a form that Prometheus reads."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.http_server import CALL, Running, served, wait_until

from angelforge.runtime.llm import LLM

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def fresh(toy: Path) -> Iterator[Running]:
    with LLM(toy, max_batch=4, threads=1) as llm, served(llm) as running:
        yield running


def values(running: Running) -> Values:
    families = text_string_to_metric_families(running.http.get("/metrics").text)
    return {
        (sample.name.removeprefix("angelforge_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_everything_is_counted_once(fresh: Running) -> None:
    body = {"prompt": CALL, "n": 2, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    whole = fresh.post("/v1/completions", body).json()["usage"]
    fresh.post("/v1/completions", body | {"stream": True})
    fresh.post("/v1/completions", {"prompt": []})
    fresh.http.get("/secret/path")
    wait_until(fresh.is_idle)
    found = values(fresh)
    assert whole["completion_tokens"] == 40
    assert found["generated_tokens_total", ()] == 80
    assert found["prompt_tokens_total", ()] == 4 * whole["prompt_tokens"]
    assert found["requests_ended_total", (("reason", "length"),)] == 4
    assert found["http_requests_total", (("endpoint", "/v1/completions"), ("status", "200"))] == 2
    assert found["http_requests_total", (("endpoint", "/v1/completions"), ("status", "400"))] == 1
    assert found["http_requests_total", (("endpoint", "other"), ("status", "404"))] == 1
    assert found["time_to_first_token_seconds_count", ()] == 4
    assert found["step_seconds_count", ()] > 0
    assert 0 < found["inter_token_seconds_count", ()] < 80
    assert 0 < found["draft_accepted_tokens_total", ()] <= found["draft_proposed_tokens_total", ()]
    assert found["kv_pages_free", ()] == fresh.llm.stepper.scheduler.pool.capacity
    assert found["healthy", ()] == 1
    assert "secret" not in fresh.http.get("/metrics").text


def test_cancelled_requests_are_counted(fresh: Running) -> None:
    body = {"model": "toy", "prompt": CALL, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with fresh.http.stream("POST", "/v1/completions", json=body) as stream:
        next(stream.iter_lines())
    wait_until(fresh.is_idle)
    assert values(fresh)["requests_ended_total", (("reason", "cancelled"),)] == 1


def test_shared_prompts_are_counted(fresh: Running) -> None:
    """A prompt of several pages that came before is taken from them, and the answer tells so, too."""
    body = {"prompt": CALL * 25, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    fresh.post("/v1/completions", body)
    before = values(fresh)["cached_prompt_tokens_total", ()]
    cached = fresh.post("/v1/completions", body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= 128
    wait_until(lambda: values(fresh)["cached_prompt_tokens_total", ()] == before + cached)
