"""Starts Ray Serve with a gateway and its replicas, and ends them when told to."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from angelforge.errors import AngelForgeError
from angelforge.runtime.replicas.gateway import Gateway
from angelforge.runtime.replicas.options import ReplicaOptions
from angelforge.runtime.replicas.replica import Replica
from angelforge.runtime.server.run import bind

_NAME = "angelforge"
_CHECK_SECONDS = 2.0  # between questions after a replica's health
_GATEWAY_REQUESTS = 10_000  # open at once; what a replica takes is its own limit


def run(options: ReplicaOptions, listening: Callable[[str], None]) -> None:
    """What `serve_replicas` does, once Ray may be imported."""
    host, port = options.server.host, options.server.port
    bind(host, port).close()  # says at once if another process listens there
    told = threading.Event()
    with _ray(options), _signals(told):  # Ray sets handlers of its own when it starts
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        try:
            serve.run(_application(options), name=_NAME, route_prefix="/")
        except RuntimeError as error:
            raise AngelForgeError(f"The replicas could not be started: {_reason()}") from error
        listening(f"http://{host}:{port}")
        told.wait()


def _application(options: ReplicaOptions) -> Any:
    replica = serve.deployment(
        Replica,
        num_replicas=options.count,
        max_ongoing_requests=options.server.max_requests,
        max_queued_requests=options.server.max_requests,
        ray_actor_options={"num_cpus": 0, "num_gpus": options.gpus},
        health_check_period_s=_CHECK_SECONDS,
        graceful_shutdown_timeout_s=options.server.drain_seconds,
        request_router_config=RequestRouterConfig(
            request_router_class="angelforge.runtime.replicas.routing.PrefixRouter"
        ),
    )
    gateway = serve.deployment(
        Gateway,
        max_ongoing_requests=_GATEWAY_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=options.server.drain_seconds,
    )
    return gateway.bind(replica.bind(options), options.server.max_body)


@contextmanager
def _ray(options: ReplicaOptions) -> Iterator[None]:
    """A Ray of its own, for which a token is needed, or the cluster at an address."""
    own = {"include_dashboard": False} if options.cluster is None else {}
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        ray.init(address=options.cluster or "local", log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise AngelForgeError(f"Ray cannot be started or reached: {error}") from error
    try:
        yield
    finally:
        if options.cluster is None:
            serve.shutdown()
        else:
            serve.delete(_NAME)
        ray.shutdown()


@contextmanager
def _signals(told: threading.Event) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    kept = {number: signal.signal(number, lambda *_: told.set()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _reason() -> str:
    """Why replicas do not start, in their own words."""
    application = serve.status().applications.get(_NAME)
    messages = [] if application is None else [deployment.message for deployment in application.deployments.values()]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "no replica said why."
