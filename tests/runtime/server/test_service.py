"""The service between asyncio and the engine's thread: cancelling, draining, stopping, and being full."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import process_time

import pytest
from support.paged_engine import PagedEngine

from angelforge.errors import AngelForgeError, UsageError
from angelforge.runtime.call import Call, Work
from angelforge.runtime.llm import LLM
from angelforge.runtime.sampling import SamplingParams
from angelforge.runtime.service import BusyError, Service, UnavailableError

LONG = SamplingParams(max_tokens=60)


@asynccontextmanager
async def running(**options: int) -> AsyncIterator[Service]:
    service = Service(LLM.from_engine(PagedEngine(max_context=100), max_batch=4), **options)
    service.start()
    try:
        yield service
    finally:
        await service.stop()


async def finish(call: Call) -> list[str]:
    """The finish reasons of a call."""
    reasons = {}
    while deltas := await call.next():
        reasons |= {delta.index: delta.output.finish_reason for delta in deltas if delta.output is not None}
    return [reasons[index] for index in range(len(call.requests))]


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it does not come to hold")


def test_outputs_are_those_of_the_llm() -> None:
    async def check() -> None:
        async with running() as service:
            calls = [service.submit([Work([3, index], LONG)]) for index in range(9)]
            for index, call in enumerate(calls):
                tokens = []
                while deltas := await call.next():
                    tokens += [token for delta in deltas for token in delta.token_ids]
                (alone,) = LLM.from_engine(PagedEngine(max_context=100)).generate([[3, index]], LONG)
                assert tuple(tokens) == alone.token_ids
            assert service.load.pages_used == service.load.running == service.load.waiting == 0

    asyncio.run(check())


def test_cancelling_frees_everything() -> None:
    """At any time: before the first step, while it runs, and after the end, when it does nothing."""

    async def check() -> None:
        async with running() as service:
            for pause in (0.0, 0.01, 0.05):
                calls = [service.submit([Work([1, 2], LONG), Work([3], LONG)]) for _ in range(6)]
                await asyncio.sleep(pause)
                for call in calls:
                    call.cancel()
                    call.cancel()
                assert {reason for call in calls for reason in await finish(call)} <= {"cancelled", "length"}
                await until(lambda: service.load.pages_used == 0)
                assert service.open_requests == 0
                calls[0].cancel()

    asyncio.run(check())


def test_full_and_impossible_requests_leave_no_trace() -> None:
    async def check() -> None:
        async with running(max_requests=2) as service:
            call = service.submit([Work([1], LONG), Work([2], LONG)])
            with pytest.raises(BusyError):
                service.submit([Work([1], LONG)])
            assert await finish(call) == ["length"] * 2
            with pytest.raises(UsageError):
                service.submit([Work([1], LONG), Work([99], LONG)])
            assert service.open_requests == 0
            assert await finish(service.submit([Work([1], LONG)])) == ["length"]

    asyncio.run(check())


def test_draining_lets_work_end_or_ends_it() -> None:
    async def check(seconds: float) -> tuple[list[str], Call]:
        async with running() as service:
            call = service.submit([Work([1], LONG)] * 4)
            await service.drain(seconds)
            assert service.health == "draining"
            with pytest.raises(UnavailableError):
                service.submit([Work([1], LONG)])
            return await finish(call), call

    assert asyncio.run(check(30))[0] == ["length"] * 4
    reasons, call = asyncio.run(check(0))
    assert set(reasons) <= {"length", "error"}
    assert call.fault == "stopped"


def test_stopping_ends_what_is_open() -> None:
    async def check() -> list[str]:
        async with running() as service:
            call = service.submit([Work([1], LONG)] * 8)
        await service.stop()
        assert service.health == "ended"
        with pytest.raises(UnavailableError):
            service.submit([Work([1], LONG)])
        return await finish(call)

    assert "error" in asyncio.run(check())


def test_a_failed_step_ends_its_requests_alone() -> None:
    async def check() -> None:
        async with running() as service:
            engine = service.llm.stepper.engine
            engine.fail_with = "The engine has failed."
            call = service.submit([Work([1], LONG)])
            deltas = await call.next()
            assert deltas[-1].output.error == "The engine has failed."
            assert call.fault is None
            assert service.health == "ok"
            assert await finish(service.submit([Work([1], LONG)])) == ["length"]

    asyncio.run(check())


def test_an_idle_service_does_not_spin() -> None:
    async def check() -> float:
        async with running() as service:
            await finish(service.submit([Work([1], LONG)]))
            begin = process_time()
            await asyncio.sleep(0.5)
            return process_time() - begin

    assert asyncio.run(check()) < 0.25


def test_a_request_that_cannot_be_queued_is_the_callers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        async with running() as service:

            def refuse(request: object) -> None:
                raise AngelForgeError("It does not fit.")

            monkeypatch.setattr(service.llm.stepper, "add", refuse)
            call = service.submit([Work([1], LONG)])
            assert await finish(call) == ["error"]
            assert call.fault == "refused"

    asyncio.run(check())
