"""Options and arguments that several commands share, so that they read the same everywhere."""

from pathlib import Path

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines instead of text.")

bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
