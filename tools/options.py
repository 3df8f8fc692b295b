"""Options and arguments that several commands share, so that they read the same everywhere."""

import math
from pathlib import Path
from typing import Any

import click

from angelforge.errors import UsageError

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines instead of text.")

bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))


class _Number(click.types.FloatParamType):
    """A finite number: `nan` and `inf`, which Python's floats know, make sense nowhere."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        """The number; a click error otherwise."""
        number = float(super().convert(value, parameter, context))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", parameter, context)
        return number


#: The type of every option that takes a number with a fraction.
NUMBER = _Number()


def require_writable(option: str, path: Path | None) -> None:
    """Raises UsageError where an option names no file that can be written, before anything is computed."""
    if path is not None and not path.absolute().parent.is_dir():
        raise UsageError(f"{option} names a file in {path.parent}, which is no folder; make it first.")
    if path is not None and path.is_dir():
        raise UsageError(f"{option} is {path}, which is a folder; name a file in it.")
