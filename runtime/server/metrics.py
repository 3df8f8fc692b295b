"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from angelforge.runtime.observer import Load, Observer
from angelforge.runtime.request import RequestOutput

_STEP = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_TOKEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
_FIRST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics(Observer):
    """Counts what a service tells. A registry of its own, so that two servers in a process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"angelforge_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"angelforge_{name}", text, buckets=buckets, registry=self.registry)

        self.requests = counter("http_requests", "Answers by endpoint and status.", "endpoint", "status")
        self._ended = counter("requests_ended", "Generations that ended, by reason.", "reason")
        self._prompt = counter("prompt_tokens", "Tokens of the prompts of ended generations.")
        self._cached = counter("cached_prompt_tokens", "Prompt tokens that were taken from shared pages.")
        self._tokens = counter("generated_tokens", "Tokens that were generated.")
        self._proposed = counter("draft_proposed_tokens", "Tokens that the draft proposed.")
        self._accepted = counter("draft_accepted_tokens", "Proposed tokens that came out.")
        self._step = histogram("step_seconds", "Time of a step of the engine, host work included.", _STEP)
        self._first = histogram("time_to_first_token_seconds", "From submission to the first token.", _FIRST)
        self._between = histogram("inter_token_seconds", "Between a token and the one before it.", _TOKEN)

    def watch(self, load: Callable[[], Load], healthy: Callable[[], bool]) -> None:
        """Adds gauges of the engine's state, which are asked when Prometheus asks."""

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(f"angelforge_{name}", text, registry=self.registry).set_function(value)

        gauge("requests_running", "Generations that hold pages.", lambda: load().running)
        gauge("requests_waiting", "Generations that wait for a place.", lambda: load().waiting)
        gauge("kv_pages_used", "Pages of the KV cache that are held.", lambda: load().pages_used)
        gauge("kv_pages_free", "Pages of the KV cache that are free.", lambda: load().pages_free)
        gauge("kv_pages_cached", "Pages whose prefix can be found again, held or free.", lambda: load().pages_cached)
        gauge("requests_set_back", "Generations that gave their pages to older ones, so far.", lambda: load().set_back)
        gauge("healthy", "1 while /health answers 200.", lambda: float(healthy()))

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return bytes(generate_latest(self.registry))

    def stepped(self, seconds: Sequence[float]) -> None:
        """Times of steps."""
        for one in seconds:
            self._step.observe(one)

    def first_token(self, seconds: float) -> None:
        """The wait for a first token; with a prompt of its own length each, so the buckets are wide."""
        self._first.observe(seconds)

    def tokens(self, count: int, seconds: float) -> None:
        """Several tokens that came at once (a draft's) share the time since the last."""
        for _ in range(count):
            self._between.observe(seconds / count)

    def ended(self, output: RequestOutput) -> None:
        """Counts what belongs to an output as a whole."""
        self._ended.labels(output.finish_reason).inc()
        self._prompt.inc(len(output.prompt_token_ids))
        self._cached.inc(output.cached_tokens)
        self._tokens.inc(len(output.token_ids))
        if output.speculation is not None:
            self._proposed.inc(output.speculation.proposed)
            self._accepted.inc(output.speculation.accepted)
