"""What `bench decode` and `bench serve` both take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

import click

from angelforge.errors import UsageError
from angelforge.tools.load.prompts import Ask, read_dataset, synthetic
from angelforge.tools.options import NUMBER


def _concurrencies(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    parts = value.split(",")
    if not all(part.isascii() and part.isdigit() and 1 <= int(part) <= 1024 for part in parts):
        raise UsageError(f"--concurrency is {value!r}, but numbers from 1 to 1024 with commas between are needed.")
    return tuple(map(int, parts))


def _page(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and value.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--plot is {str(value)!r}, but what is written is an HTML page: name it so, with .html.")
    if value is not None and not value.parent.is_dir():  # told now, not when all has been measured
        raise UsageError(f"--plot is {str(value)!r}, but there is no folder {str(value.parent)!r}. Make it first.")
    return value


_COUNT = click.IntRange(min=1)
_PATH = click.Path(path_type=Path)
_OPTIONS = (
    click.option(
        "--concurrency",
        "concurrencies",
        default="1,4,16,32,64",
        show_default=True,
        callback=_concurrencies,
        help="How many requests are in flight, one figure after another.",
    ),
    click.option("--dataset", type=_PATH, help="JSON lines with messages, question, problem or prompt."),
    click.option("--raw", is_flag=True, help="Ask the texts of a dataset as they are, not as chats."),
    click.option("--input-tokens", type=_COUNT, default=128, show_default=True, help="Random ones, without a dataset."),
    click.option(
        "--output-tokens", type=_COUNT, default=128, show_default=True, help="At most with a dataset, else exactly."
    ),
    click.option("--requests", type=_COUNT, help="For each figure. Default: twice the concurrency, at least 8."),
    click.option("--temperature", type=NUMBER, default=0.0, show_default=True, help="0: always the likeliest token."),
    click.option("--plot", type=_PATH, callback=_page, help="Write curves to this HTML file."),
)


@dataclass(frozen=True)
class LoadOptions:
    """What is asked, how much of it at once, and where the curves go."""

    concurrencies: tuple[int, ...]
    dataset: Path | None
    raw: bool
    input_tokens: int
    output_tokens: int
    requests: int | None
    temperature: float
    plot: Path | None


def load_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options to a command, which takes them as one `load: LoadOptions`."""

    @wraps(command)
    def with_load(**values: Any) -> None:
        taken = {field.name: values.pop(field.name) for field in fields(LoadOptions)}
        command(load=LoadOptions(**taken), **values)

    given: Callable[..., None] = with_load
    for option in reversed(_OPTIONS):
        given = option(given)
    return given


class Asks:
    """The requests of all figures: a dataset in its order, over and over, or random ones, fresh for each figure."""

    def __init__(self, load: LoadOptions, vocab_size: int) -> None:
        """`vocab_size` bounds random ids. Raises UsageError for a dataset that cannot be asked."""
        if load.raw and load.dataset is None:
            raise UsageError("--raw is for --dataset.")
        self._lines = None if load.dataset is None else read_dataset(load.dataset, load.output_tokens, load.raw)
        self._sizes = (load.input_tokens, load.output_tokens, vocab_size)
        self._requests = load.requests
        self._next = 0

    def take(self, concurrency: int) -> Sequence[Ask]:
        """The requests of the next figure."""
        count = self._requests or max(8, 2 * concurrency)
        begin, self._next = self._next, self._next + count
        if self._lines is None:
            return synthetic(count, *self._sizes, seed=begin)
        return [self._lines[number % len(self._lines)] for number in range(begin, self._next)]
