"""The server's process: listens, and ends in order when it is told to."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import current_thread, main_thread

import uvicorn

from angelforge.errors import AngelForgeError, UsageError
from angelforge.runtime.llm import LLM
from angelforge.runtime.server.app import create_app
from angelforge.runtime.server.options import ServerOptions
from angelforge.runtime.server.silence import Silence
from angelforge.runtime.service import ENDED

_KEEP_ALIVE = 75  # seconds that an unused connection stays open: longer than proxies and clients keep theirs
_LAST_WORDS = 1  # second for the same when the server is told twice
_TICK = 0.1  # seconds between two looks at whether it was
_ENGINE_GONE = 2.0  # seconds in which a server without an engine says so before it ends
_AFTER_DRAINING = 5  # seconds until connections that still send their last words are cut,
_AFTER_CUTTING = 5  # and until their tasks have to have noticed


class Server(uvicorn.Server):
    """A server that drains its service before it ends: nothing new, what runs may finish, the rest gets an error."""

    def __init__(self, llm: LLM, options: ServerOptions, bound: socket.socket) -> None:
        """Takes the socket that `bind` gave; the LLM stays open when the server ends."""
        app, self.service = create_app(llm, options)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,  # a log of requests is the proxy's; nothing here writes what is asked or answered
            timeout_graceful_shutdown=int(options.drain_seconds) + _AFTER_DRAINING + _AFTER_CUTTING,
            server_header=False,
            ws="none",
            timeout_keep_alive=_KEEP_ALIVE,
            callback_notify=self._look,
            timeout_notify=1,
        )
        super().__init__(config)
        self._options = options
        self._silence = Silence(_KEEP_ALIVE)
        self._socket = bound
        address, port = bound.getsockname()[:2]
        self.url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"

    async def run_until_told(self, listening: Callable[[], None] | None = None) -> None:
        """Serves until SIGTERM, SIGINT or `tell_to_end`; `listening` is called once requests are answered.

        Raises AngelForgeError when the engine's thread has ended by itself: what was open has an error by then, and
        what starts the process again should. UsageError when another process listens on the address already; what
        `listening` raises, after an orderly end.
        """
        crash = asyncio.ensure_future(self._end_with_engine())
        serving = asyncio.ensure_future(self.serve([self._socket]))
        try:
            with ExitStack() as failing:
                failing.callback(self.tell_to_end)
                while not self.started and not serving.done():
                    await asyncio.sleep(0.01)
                if listening is not None and self.started:
                    listening()
                failing.pop_all()
        finally:
            await serving
            crash.cancel()
        if self.service.crashed.is_set():
            raise AngelForgeError(ENDED)

    async def _look(self) -> None:
        self._silence.look(list(self.server_state.connections))

    async def _end_with_engine(self) -> None:
        await self.service.crashed.wait()
        await asyncio.sleep(_ENGINE_GONE)
        self.tell_to_end()

    def tell_to_end(self) -> None:
        """Begins the end; safe in any thread."""
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own sends a signal again when all is done: a server that was told to end has not failed.

        Once it is told, all that is left to the process is to end: more signals do not disturb that.
        """
        if current_thread() is not main_thread():
            yield
            return
        kept = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                # Not a handler of ours: Python takes those away at its very end, and then a signal would kill it.
                signal.signal(number, signal.SIG_IGN if self._captured_signals else handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts the service and listens."""
        for bound in sockets or ():  # `bind` says why
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            await super().startup(sockets)
        except OSError as error:
            await self.lifespan.shutdown()
            raise _taken(self._options.host, self._options.port, error) from None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Closes the door, lets the service come to an end, then the connections; a second interrupt ends all that."""
        draining = asyncio.ensure_future(self.service.drain(self._options.drain_seconds))
        cutting = asyncio.get_running_loop().call_later(self._options.drain_seconds + _AFTER_DRAINING, self._cut)
        closing = asyncio.ensure_future(super().shutdown(sockets))
        while not closing.done() and not self.force_exit:
            await asyncio.wait({closing}, timeout=_TICK)
        if self.force_exit:
            await self._end_at_once()
        await closing
        cutting.cancel()
        draining.cancel()

    async def _end_at_once(self) -> None:
        """Ends the service, which uvicorn leaves as it is then, and what uvicorn waits for since Python 3.12."""
        await self.lifespan.shutdown()
        if tasks := list(self.server_state.tasks):  # their requests have ended: they say so, if somebody reads it
            await asyncio.wait(tasks, timeout=_LAST_WORDS)
        logging.getLogger("uvicorn.error").disabled = True  # what is left is cut, which is no error any more
        self._cut()

    def _cut(self) -> None:
        """Closes the connections whose clients do not read what was sent; their requests have ended."""
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound but refuses connections until a server listens; the system chooses a port for 0.

    No other process can bind the address meanwhile. Raises UsageError if that cannot be: before a model is loaded for
    minutes.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        # It lets us bind where connections of a server that has ended still fade away, but another process as well, as
        # long as nobody listens: not before the server does, whose connections have to have it.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        raise _taken(host, port, error) from None
    return bound


def _taken(host: str, port: int, error: OSError) -> UsageError:
    return UsageError(f"{host}:{port} cannot be listened on: {error.strerror}. Choose another --host or --port.")
