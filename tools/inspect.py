"""`angelforge inspect`: what a bundle, an engine, a checkpoint, a safetensors or an ONNX file holds."""

from pathlib import Path
from typing import Any, Protocol

import click

from angelforge.bundle import FILE
from angelforge.engines.manifest import FILE as ENGINE_FILE
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
    but a bundle or an engine.
    """
    # Imported here: each kind needs other libraries.
    if (path / FILE).is_file():
        from angelforge.tools.inspect_bundle import BundleReport

        return BundleReport.read(path, verify)
    if not path.exists():
        raise AngelForgeError(
            f"There is no {path}. Give a bundle, an engine's folder, a checkpoint's folder, a safetensors or ONNX file."
        )
    if (path / ENGINE_FILE).is_file():
        from angelforge.tools.inspect_engine import EngineReport

        return EngineReport.read(path, verify)
    if verify:
        raise UsageError(f"{path} is no bundle or engine, and only those hold the digests that --verify compares.")
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
@click.option("--verify", is_flag=True, help="Compare the sha256 of every file of a bundle or engine; reads all of it.")
@click.option("--html", type=click.Path(path_type=Path), help="Also write a page: structure and memory, with plots.")
@json_option
def inspect(path: Path, verify: bool, html: Path | None, as_json: bool) -> None:
    """Show what PATH holds: a bundle, an engine's folder, a checkpoint's folder, a safetensors file or an ONNX file.

    What is told is checked on the way: a bundle's files against its manifest by name, size and header, a checkpoint's
    tensors against its configuration.

    \b
    Example:
      angelforge inspect bundle --verify
      angelforge inspect bundle/engines/h20
    """
    report = look(path, verify)
    if html is not None:
        _write_page(path, report, html)
    if as_json:
        print_json(report.to_dict())
    else:
        report.show()


def _write_page(path: Path, report: Report, file: Path) -> None:
    """The page of a bundle with all of its engines, or of one engine and the bundle around it."""
    from angelforge.tools.inspect_bundle import BundleReport
    from angelforge.tools.inspect_engine import EngineReport
    from angelforge.tools.inspect_page import write_page

    if isinstance(report, BundleReport):
        write_page(report.bundle, report.engines, file)
    elif isinstance(report, EngineReport):
        write_page(report.bundle, {report.manifest.target: report.manifest}, file)
    else:
        raise UsageError(f"{path} is no bundle or engine, and only those have a page to write.")
