"""Validations of engines with planted faults, and the table of docs/validation.md: python -m support.fault_table."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from angelforge.bundle import Bundle
from angelforge.exporter.export import ExportOptions
from angelforge.precision import Precision
from angelforge.runtime.validate.compare import Finding, first_failure
from angelforge.runtime.validate.data import Schedule, random_sequences, schedule
from angelforge.runtime.validate.engine_graph import EngineGraph
from angelforge.runtime.validate.operations import JudgeGraph, judge_graph
from angelforge.runtime.validate.thresholds import thresholds
from angelforge.runtime.validate.walk import StageValues, compare_stages, walk
from support.built import make_bundle
from support.faults import Fault, faulty_engine

SIZES = {"hidden_size": 256, "num_hidden_layers": 3, "vocab_size": 320, "max_position_embeddings": 64}
_LAYERS = {"fp32": 3, "bf16": 2, "fp8": 2}


@dataclass(frozen=True)
class Judged:
    """A bundle and what the judge computed in it."""

    bundle: Bundle
    judge: JudgeGraph
    schedule: Schedule
    walked: list[StageValues]


def judged_bundle(kind: str, folder: Path) -> Judged:
    """A model with YaRN over 64 trained positions, in "fp32", "bf16" or "fp8".

    Two sequences over two pages each, beyond the trained length, in chunks that end inside pages.
    """
    options = ExportOptions(precision=Precision(kind), rope_scaling="yarn:4")
    _, bundle = make_bundle(folder, {**SIZES, "num_hidden_layers": _LAYERS[kind]}, options)
    sequences = random_sequences(2, 320, 76)
    planned = schedule(sequences, page_size=64, vocab_size=320, max_context=256, chunk=90)
    judge = judge_graph(bundle)
    return Judged(bundle, judge, planned, list(walk(judge, bundle, planned)))


def compare(judged: Judged, fault: Fault, folder: Path, by_layer: bool = False) -> Iterator[list[Finding]]:
    """What a validation of the faulty engine finds in one layer after another."""
    model, root = faulty_engine(judged.bundle, fault, folder)
    engine = EngineGraph(model, root, judged.judge)
    limits = thresholds(judged.bundle.manifest.precision, as_stored=False)
    for _, found in compare_stages(judged.judge, engine, judged.schedule, limits, judged.walked, by_layer=by_layer):
        yield found


def locate(judged: Judged, fault: Fault, folder: Path) -> Finding | None:
    """The first diverging tensor, operator by operator."""
    layers = compare(judged, fault, folder)
    return next((first for found in layers if (first := first_failure(found)) is not None), None)


def row_start(fault: Fault, found: Finding) -> str:
    """The part of the table's row that does not depend on the machine."""
    tensor = found.tensor.rsplit(".", 1)[-1] if found.tensor.startswith("v_") else found.tensor
    return f"| {fault.name} | {fault.bundle} | {found.place} | {found.operator} | `{tensor}` |"


def row(fault: Fault, found: Finding) -> str:
    """A row of the table."""
    values = "".join(f"{list(w.index)}: {w.expected:.4g} → {w.found:.4g}" for w in found.result.worst[:1])
    return f"{row_start(fault, found)} {found.error:.1e} | {values} | {found.note} |"
