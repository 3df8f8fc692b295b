"""`angelforge inspect`: what a bundle, a checkpoint, a safetensors or an ONNX file holds."""

from pathlib import Path
from typing import Any, Protocol

import click

from angelforge.bundle import FILE
from angelforge.errors import AngelForgeError, UsageError
from angelforge.tools.options import json_option
from angelforge.tools.output import print_json


class Report(Protocol):
    """What was found, for people and for machines."""

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values; `kind` says what it is."""

    def show(self) -> None:
        """Print it for people."""


def look(path: Path, verify: bool) -> Report:
    """Find out what `path` is and read it; no weights are read unless `verify` asks for all of a bundle's.

    Raises AngelForgeError for what is not there, damaged, or nothing of the kind; UsageError for `verify` of anything
    but a bundle.
    """
    # Imported here: each kind needs other libraries.
    if (path / FILE).is_file():
        from angelforge.tools.inspect_bundle import BundleReport

        return BundleReport.read(path, verify)
    if not path.exists():
        raise AngelForgeError(f"There is no {path}. Give a bundle, a checkpoint's folder, a safetensors or ONNX file.")
    if verify:
        raise UsageError(f"{path} is no bundle, and only bundles hold the digests that --verify compares.")
    if path.suffix == ".onnx":
        from angelforge.tools.inspect_graph import GraphReport

        return GraphReport.read(path)
    if path.suffix != ".safetensors" and not (path / "config.json").is_file():
        raise AngelForgeError(
            f"{path} is neither a bundle (no {FILE}) nor a checkpoint (no config.json), nor a safetensors or ONNX "
            "file. Name one of those."
        )
    from angelforge.tools.inspect_files import CheckpointReport, TensorFileReport

    return CheckpointReport.read(path) if path.is_dir() else TensorFileReport.read(path)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Compare the sha256 of every file of a bundle; reads all of it.")
@json_option
def inspect(path: Path, verify: bool, as_json: bool) -> None:
    """Show what PATH holds: a bundle, a checkpoint's folder, a safetensors file or an ONNX file.

    What is told is checked on the way: a bundle's files against its manifest by name, size and header, a checkpoint's
    tensors against its configuration.

    \b
    Example:
      angelforge inspect bundle --verify
    """
    report = look(path, verify)
    if as_json:
        print_json(report.to_dict())
    else:
        report.show()
