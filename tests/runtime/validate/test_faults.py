"""Planted faults are found, and located at the layer and operator where they arise; without a fault nothing is."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.built import make_bundle
from support.faults import FAULTS, Fault, faulty_engine

from angelforge.bundle import Bundle
from angelforge.exporter.export import ExportOptions
from angelforge.precision import Precision
from angelforge.runtime.validate.compare import Finding, first_failure
from angelforge.runtime.validate.data import Schedule, random_sequences, schedule
from angelforge.runtime.validate.engine_graph import EngineGraph
from angelforge.runtime.validate.operations import JudgeGraph, judge_graph
from angelforge.runtime.validate.results import describe
from angelforge.runtime.validate.thresholds import thresholds
from angelforge.runtime.validate.walk import StageValues, compare_stages, walk

SIZES = {"hidden_size": 256, "num_hidden_layers": 3, "vocab_size": 320, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """A model in f32 with YaRN over 64 trained positions, and a smaller one in FP8."""
    exact = ExportOptions(precision=Precision.FP32, rope_scaling="yarn:4")
    quantized = ExportOptions(precision=Precision.FP8, rope_scaling="yarn:4")
    return {
        "fp32": make_bundle(tmp_path_factory.mktemp("fp32"), SIZES, exact)[1],
        "fp8": make_bundle(tmp_path_factory.mktemp("fp8"), {**SIZES, "num_hidden_layers": 2}, quantized)[1],
    }


@dataclass(frozen=True)
class Judged:
    """A bundle and what the judge computed in it."""

    bundle: Bundle
    judge: JudgeGraph
    schedule: Schedule
    walked: list[StageValues]


@pytest.fixture(scope="module")
def judged(bundles: dict[str, Bundle]) -> dict[str, Judged]:
    """Two sequences over two pages each, beyond the trained length, in chunks that end inside pages."""
    found = {}
    for kind, bundle in bundles.items():
        vocab = bundle.manifest.model.vocab_size
        sequences = random_sequences(2, vocab, 76)
        planned = schedule(sequences, page_size=64, vocab_size=vocab, max_context=256, chunk=90)
        judge = judge_graph(bundle)
        found[kind] = Judged(bundle, judge, planned, list(walk(judge, bundle, planned)))
    return found


def compare(judged: Judged, fault: Fault, folder: Path, by_layer: bool = False) -> Iterator[list[Finding]]:
    """What a validation of the faulty engine finds in one layer after another."""
    model, root = faulty_engine(judged.bundle, fault, folder)
    engine = EngineGraph(model, root, judged.judge)
    limits = thresholds(judged.bundle.manifest.precision, as_stored=False)
    for _, found in compare_stages(judged.judge, engine, judged.schedule, limits, judged.walked, by_layer=by_layer):
        yield found


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_are_located(judged: dict[str, Judged], fault: Fault, tmp_path: Path) -> None:
    """The first diverging tensor is an output of the faulty operator."""
    layers = compare(judged[fault.bundle], fault, tmp_path)
    first = next((first for found in layers if (first := first_failure(found)) is not None), None)
    assert first is not None, "not found"
    assert (first.place, first.operator) == (fault.place, fault.operator), "\n".join(describe(first))
    assert first.result.worst


@pytest.mark.parametrize("kind", ["fp32", "fp8"])
def test_an_engine_without_a_fault_passes(judged: dict[str, Judged], kind: str, tmp_path: Path) -> None:
    """Built in the same way, every operator is seen by itself and within its limit."""
    found = [f for layer in compare(judged[kind], Fault("none", kind, "", ""), tmp_path) for f in layer]
    assert first_failure(found) is None
    seen = {(finding.place, finding.operator) for finding in found}
    operations = {(o.place, o.name) for o in judged[kind].judge.operations if o.kind != "AllReduce"}
    assert operations - seen == set()


def test_a_fault_stays_in_its_layer(judged: dict[str, Judged], tmp_path: Path) -> None:
    """Layer by layer, each is given the judge's inputs: only the faulty layer fails, not those behind it."""
    fault = next(fault for fault in FAULTS if fault.name == "a wrong expert bias sign")
    found = [f for layer in compare(judged["fp32"], fault, tmp_path, by_layer=True) for f in layer]
    assert {finding.place for finding in found if not finding.ok} == {fault.place}
