"""`angelforge run --chat`: a conversation on the terminal, or with lines from a pipe."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import click

from angelforge.errors import AngelForgeError, UsageError
from angelforge.runtime.llm import LLM
from angelforge.runtime.sampling import SamplingParams
from angelforge.tools.run_text import finished_line, write

_HELP = "Ctrl-D ends the chat, /reset forgets the conversation."


def chat(llm: LLM, params: SamplingParams, system: str | None) -> None:
    """Answers lines until there are no more; keeps the conversation. A turn that fails is told and forgotten."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    llm.chat_prompt([*opening, {"role": "user", "content": ""}])  # without tokenizer or template: say so at once
    if sys.stdin.isatty():
        click.echo(_HELP, err=True)
        if importlib.util.find_spec("readline"):
            importlib.import_module("readline")  # input() then edits lines and keeps a history
    messages = list(opening)
    while (line := _next_line()) is not None:
        if line == "/reset":
            messages = list(opening)
        elif line.strip():
            turn = [*messages, {"role": "user", "content": line}]
            try:
                messages = [*turn, {"role": "assistant", "content": _answer(llm, turn, params)}]
            except AngelForgeError as error:
                click.echo(f"error: {error} /reset starts anew.", err=True)


def _answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> str:
    with finished_line():
        for delta in llm.stream([llm.chat_prompt(messages)], params):
            write(delta.text)
            output = delta.output
    assert output is not None  # the last delta has it
    click.echo()
    if output.error is not None:
        raise AngelForgeError(output.error)
    return output.text


def _next_line() -> str | None:
    asking = sys.stdin.isatty()
    try:
        return input("> " if asking else "")
    except UnicodeDecodeError as error:
        raise UsageError(f"The input is not text in {error.encoding}.") from None
    except (EOFError, KeyboardInterrupt) as end:
        if asking:
            click.echo()  # the prompt stands on this line
        if isinstance(end, KeyboardInterrupt):
            raise
        return None
