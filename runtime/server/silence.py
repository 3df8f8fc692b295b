"""Connections on which no request comes: held open in numbers, they would keep everybody else out."""

from __future__ import annotations

from collections.abc import Collection
from time import monotonic
from typing import Any


class Silence:
    """Closes connections that stay open for `patience` seconds without a whole request's headers.

    uvicorn does that only after a first request, and only as long as nothing of a next one has come.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._since: dict[Any, tuple[Any, float]] = {}  # a connection's latest request, and when it was seen so first

    def look(self, connections: Collection[Any]) -> None:
        """To be called now and then with uvicorn's open connections."""
        now, since = monotonic(), {}
        for connection in connections:
            request = connection.cycle  # None before the first
            if request is not None and not request.response_complete:
                continue
            before, begin = self._since.get(connection, (request, now))
            since[connection] = (request, begin if before is request else now)
            if now - since[connection][1] > self._patience:
                connection.transport.close()
        self._since = since
