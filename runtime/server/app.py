"""The application: endpoints, and what every request passes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from angelforge.runtime.llm import LLM
from angelforge.runtime.server.chats import Chats
from angelforge.runtime.server.completions import Completions
from angelforge.runtime.server.errors import ApiError, add_error_handlers
from angelforge.runtime.server.gates import CountGate, KeyGate, SizeGate
from angelforge.runtime.server.host import Host
from angelforge.runtime.server.metrics import Metrics
from angelforge.runtime.server.options import ServerOptions
from angelforge.runtime.server.vocabulary import Vocabulary
from angelforge.runtime.service import Service

_ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")


def create_app(llm: LLM, options: ServerOptions) -> tuple[FastAPI, Service]:
    """The application around a loaded LLM, and the service in it, which runs while the application does."""
    metrics = Metrics()
    service = Service(llm, max_requests=options.max_requests, observer=metrics)
    metrics.watch(lambda: service.load, lambda: service.health == "ok")
    host = Host(service, options, Vocabulary(llm))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    # No pages of documentation: they load scripts from elsewhere. The schema is at /openapi.json.
    app = FastAPI(title="AngelForge", lifespan=lifespan, docs_url=None, redoc_url=None)
    add_error_handlers(app)
    for path, endpoint in (("/v1/completions", Completions(host)), ("/v1/chat/completions", Chats(host))):
        app.add_api_route(path, endpoint.create, methods=["POST"], response_model=None)
    _add_state(app, host, metrics)
    # The last that is added is passed first.
    app.add_middleware(SizeGate, limit=options.max_body, stall_seconds=options.stall_seconds)
    app.add_middleware(KeyGate, key=options.api_key)
    app.add_middleware(CountGate, metrics=metrics, endpoints=_ENDPOINTS)
    return app, service


def _add_state(app: FastAPI, host: Host, metrics: Metrics) -> None:
    """The endpoints that tell what there is and how it is."""
    model = {
        "id": host.options.model,
        "object": "model",
        "created": host.created,
        "owned_by": "angelforge",
        "max_model_len": host.service.llm.max_context,
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != host.options.model:
            raise ApiError(404, f"The model {name!r} does not exist.", "model", "model_not_found")
        return model

    @app.get("/health")
    async def health() -> JSONResponse:
        state = host.service.health
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    @app.get("/metrics")
    async def page() -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)
