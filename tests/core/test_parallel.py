"""Tasks in threads: results in order, the first failure ends all."""

import threading

import pytest

from angelforge.parallel import run_all


def test_results_come_in_the_order_of_the_tasks():
    """Whatever order they end in: here the first waits for the last."""
    gate = threading.Event()
    tasks = [lambda: gate.wait(30), lambda: 2, lambda: gate.set() or 3]
    stop = threading.Event()
    assert run_all(tasks, 2, stop) == [True, 2, 3] and stop.is_set()
    assert run_all([], 1, threading.Event()) == []


def test_a_failure_stops_the_others_and_is_raised():
    """The running task sees `stop`; the waiting one never begins."""
    stop, begun = threading.Event(), []

    def fail():
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        run_all([lambda: stop.wait(30), fail, lambda: stop.wait(30), lambda: begun.append(1)], 2, stop)
    assert not begun


def test_an_interrupt_while_watching_stops_the_tasks():
    stop, seen = threading.Event(), []

    def watch():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all([lambda: seen.append(stop.wait(30))], 1, stop, watch)
    assert seen == [True]


def test_the_caller_watches_in_its_own_thread():
    stop, calls = threading.Event(), []
    enough = threading.Event()

    def watch():
        calls.append(threading.current_thread())
        if len(calls) == 2:
            enough.set()

    run_all([lambda: enough.wait(30)], 1, stop, watch)
    assert set(calls) == {threading.current_thread()} and len(calls) >= 2
