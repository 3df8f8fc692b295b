"""One replica: a loaded engine with the server's application around it, in an actor of Ray's."""

from __future__ import annotations

from collections.abc import AsyncIterator

from angelforge.runtime.llm import LLM
from angelforge.runtime.replicas.asgi import answer
from angelforge.runtime.replicas.envelope import Envelope, Head
from angelforge.runtime.replicas.options import ReplicaOptions
from angelforge.runtime.server.app import create_app


class Replica:
    """Answers requests as the server of one process does."""

    def __init__(self, options: ReplicaOptions) -> None:
        self._llm = LLM(
            options.bundle,
            options.target,
            kv_memory=options.kv_memory,
            max_batch=options.max_batch,
            threads=options.threads_each,
            speculate=options.speculate,
        )
        self._app, self._service = create_app(self._llm, options.server)
        self._started = False

    async def answer(self, request: Envelope) -> AsyncIterator[Head | bytes]:
        """The answer's head, then its body as it comes."""
        if not self._started:  # in the event loop that submits, which does not run yet when Ray makes the object
            self._started = True
            self._service.start()
        async for piece in answer(self._app, request):
            yield piece

    def check_health(self) -> None:
        """Ray asks now and then; a replica whose engine is gone or keeps failing is started anew."""
        if self._service.health in ("failing", "ended"):
            raise RuntimeError(f"the engine of this replica is {self._service.health}")

    async def __del__(self) -> None:
        await self._service.stop()
        self._llm.close()
