"""`angelforge export`: a Hugging Face checkpoint becomes a bundle."""

from pathlib import Path
from typing import Any

import click

from angelforge.bundle import Bundle
from angelforge.precision import Precision
from angelforge.tools.options import json_option
from angelforge.tools.output import format_bytes, print_json, print_table, total_progress


@click.command()
@click.argument("checkpoint")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--draft", metavar="DIR", help="An EAGLE3 draft for this checkpoint: a folder or a Hub id.")
@click.option(
    "--precision",
    type=click.Choice([p.value for p in Precision]),
    help="Default: the checkpoint's own. fp8 quantises any other.",
)
@click.option("--rope-scaling", metavar="yarn:FACTOR", help="Stretch the context with YaRN, for example yarn:4.")
@click.option("--max-context", type=int, help="Positions of the longest sequence. Default: all the model covers.")
@click.option("--layers", type=int, help="Only the first N layers, to compare a real checkpoint on a small machine.")
@click.option("--graph-only", is_flag=True, help="Write graph and manifest from config.json alone, no weights.")
@json_option
def export(
    checkpoint: str,
    bundle: Path,
    draft: str | None,
    precision: str | None,
    rope_scaling: str | None,
    max_context: int | None,
    layers: int | None,
    graph_only: bool,
    as_json: bool,
) -> None:
    """Turn a Hugging Face checkpoint into a bundle: the ONNX graph, kernel-ready weights, tokenizer.

    CHECKPOINT is a folder or a Hub id. Memory stays below 1 GB whatever the size of the model. If the export is
    interrupted, the same command goes on where it was. Where weights are quantised, a table tells what that lost, and
    quantization.json in the bundle tells it layer by layer.

    \b
    Example:
      angelforge export AntAngelMed-FP8 bundle --rope-scaling yarn:4
    """
    from angelforge.exporter.export import ExportOptions
    from angelforge.exporter.export import export as run_export

    options = ExportOptions(
        precision=Precision(precision) if precision else None,
        rope_scaling=rope_scaling,
        max_context=max_context,
        layers=layers,
        graph_only=graph_only,
        draft=draft,
    )
    with total_progress("packing") as progress:
        result = run_export(checkpoint, bundle, options, progress)
    for note in _notes(result):
        click.echo(f"note: {note}", err=True)
    if as_json:
        print_json(_facts(result))
        return
    facts = _facts(result)
    click.echo(
        f"{result.folder}: {facts['layers']} layers in {facts['precision']}, {facts['max_context']} positions, "
        f"weights {format_bytes(facts['weight_bytes']) if facts['weight_bytes'] else 'absent'}"
        + ("" if result.manifest.draft is None else f", a draft of {result.manifest.draft.draft_vocab_size} tokens")
    )
    if facts["quantization"] is not None:
        _print_quantization(facts["quantization"])
    click.echo(f"Next: angelforge build {result.folder} --target cpu")


def _facts(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.folder),
        "layers": manifest.model.num_hidden_layers,
        "precision": manifest.precision.value,
        "max_context": manifest.max_context,
        "rope": manifest.rope,
        "weight_bytes": sum(record.size for name, record in manifest.files.items() if name.startswith("weights/")),
        "draft": None if manifest.draft is None else manifest.draft.to_dict(),
        "quantization": _quantization(bundle),
        "notes": _notes(bundle),
    }


def _quantization(bundle: Bundle) -> dict[str, Any] | None:
    """Errors of this export's quantisation: of all weights, and by kind; what stands by file is in the bundle."""
    from angelforge.exporter.quantization_report import FILE, read_report

    if FILE not in bundle.manifest.files:
        return None
    report = read_report(bundle.folder)
    return {key: report[key] for key in ("all", "kinds")}


def _print_quantization(report: dict[str, Any]) -> None:
    rows = {**report["kinds"], "all": report["all"]}
    print_table(
        ("quantised", "weights", "relative error", "largest error", "clipped", "zeros", "worst tensor"),
        [
            (
                kind,
                f"{entry['weights']:,}",
                f"{entry['relative_error']:.2%}",
                f"{entry['largest_error']:.4g} scales",
                f"{entry['clipped']:,}",
                f"{entry['zeros'] / max(entry['weights'], 1):.2%}",
                f"{entry['worst_relative_error']:.2%} {entry['worst_tensor']}",
            )
            for kind, entry in rows.items()
        ],
    )


def _notes(bundle: Bundle) -> list[str]:
    manifest = bundle.manifest
    notes = list(manifest.model.notes)
    if manifest.draft is not None:
        notes += manifest.draft.notes
    return notes
