"""`angelforge build`: a bundle's engine for a target."""

from pathlib import Path

import click

from angelforge.bundle import Bundle
from angelforge.tools.options import bundle_argument, json_option
from angelforge.tools.output import format_seconds, print_json


@click.command()
@bundle_argument
@click.option("--target", type=click.Choice(["cpu"]), default="cpu", show_default=True, help="What to build for.")
@json_option
def build(bundle: Path, target: str, as_json: bool) -> None:
    """Build a bundle's engine for a target. No weight is read: they may still be packed meanwhile.

    \b
    Example:
      angelforge build bundle --target cpu
    """
    from angelforge.engines.cpu import build_cpu, engine_folder

    opened = Bundle.open(bundle)
    manifest = build_cpu(opened)
    folder = engine_folder(opened, target)
    if as_json:
        print_json({"engine": str(folder / manifest.engine), "seconds": manifest.seconds, "target": target})
        return
    click.echo(f"{folder / manifest.engine}: built for {target} in {format_seconds(manifest.seconds)}")
    click.echo(f'Next: angelforge run {bundle} --target {target} --prompt "…"')
