"""What a service tells about its work: to metrics, say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from angelforge.runtime.request import RequestOutput

if TYPE_CHECKING:
    from angelforge.runtime.llm import LLM


@dataclass(frozen=True)
class Load:
    """What an engine is busy with."""

    running: int  # requests that hold pages
    waiting: int  # requests that do not yet
    pages_used: int
    pages_free: int
    pages_cached: int  # whose prefix can be found again, held or free
    set_back: int  # requests that had to give their pages to older ones, since the start

    @classmethod
    def of(cls, llm: LLM) -> Load:
        """The state between two steps; only the thread that steps may ask while one is stepping."""
        scheduler = llm.stepper.scheduler
        pool = scheduler.pool
        return cls(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_used=pool.capacity - pool.free,
            pages_free=pool.free,
            pages_cached=pool.cached,
            set_back=scheduler.set_back,
        )


class Observer:
    """Is told what happens, in the event loop. This one does nothing with it."""

    def stepped(self, seconds: Sequence[float]) -> None:
        """Steps took so long."""

    def first_token(self, seconds: float) -> None:
        """A request's first token came so long after it was submitted."""

    def tokens(self, count: int, seconds: float) -> None:
        """So many more tokens of a request came so long after those before them."""

    def ended(self, output: RequestOutput) -> None:
        """A request has ended, whatever the reason."""
