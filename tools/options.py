"""Options and arguments that several commands share, so that they read the same everywhere."""

from pathlib import Path

import click

from angelforge.errors import UsageError

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines instead of text.")

bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))


def require_writable(option: str, path: Path | None) -> None:
    """Raises UsageError where an option names no file that can be written, before anything is computed."""
    if path is not None and not path.absolute().parent.is_dir():
        raise UsageError(f"{option} names a file in {path.parent}, which is no folder; make it first.")
    if path is not None and path.is_dir():
        raise UsageError(f"{option} is {path}, which is a folder; name a file in it.")
