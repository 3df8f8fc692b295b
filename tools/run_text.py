"""How `angelforge run` prints outputs while they come."""

from __future__ import annotations

import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import click

from angelforge.runtime.llm import LLM
from angelforge.runtime.request import Delta, RequestOutput
from angelforge.tools.output import format_seconds

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def print_outputs(llm: LLM, deltas: Iterable[Delta], count: int) -> bool:
    """Prints the outputs of `count` prompts in their order, the first unfinished one as it comes.

    Errors and, on a terminal, the speed go to standard error. Returns whether all went well.
    """
    outputs: list[RequestOutput] = []
    begun = False
    with finished_line():
        for delta in in_order(deltas, count):
            if count > 1 and not begun:
                click.echo(f"--- {delta.index + 1} of {count}")
            begun = delta.output is None
            # Without a tokenizer the ids are all there is to show.
            write(delta.text if llm.tokenizer is not None else "".join(f"{token} " for token in delta.token_ids))
            if delta.output is not None:
                click.echo()
                outputs.append(delta.output)
                if delta.output.error is not None:
                    click.echo(f"error: prompt {delta.index + 1} of {count}: {delta.output.error}", err=True)
    if sys.stderr.isatty():
        click.echo(_speed(outputs), err=True)
    return all(output.error is None for output in outputs)


def in_order(deltas: Iterable[Delta], count: int) -> Iterator[Delta]:
    """The deltas of `count` prompts one prompt after another, none later than it must be."""
    held: list[deque[Delta]] = [deque() for _ in range(count)]
    current = 0
    for delta in deltas:
        held[delta.index].append(delta)
        while current < count and held[current]:
            first = held[current].popleft()
            yield first
            current += first.output is not None


@contextmanager
def finished_line() -> Iterator[None]:
    """Ends the line that an interrupt leaves open."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo()
        raise


def write(text: str) -> None:
    """Prints text of a model as it is; what the terminal cannot show, or would obey, becomes a question mark."""
    if sys.stdout.isatty():
        text = _CONTROL.sub("?", text)
    encoding = sys.stdout.encoding or "utf-8"
    click.echo(text.encode(encoding, "replace").decode(encoding), nl=False)


def _speed(outputs: list[RequestOutput]) -> str:
    tokens = sum(len(output.token_ids) for output in outputs)
    seconds = max((output.timings.total for output in outputs), default=0.0)
    rate = f", {tokens / seconds:.1f} tokens/s" if seconds > 0 else ""
    return f"{tokens} tokens in {format_seconds(seconds)}{rate}"
