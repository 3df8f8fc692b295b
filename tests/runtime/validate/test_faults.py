"""Planted faults are found, and located at the layer and operator where they arise; without a fault nothing is."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.faults import FAULTS, Fault
from support.faulty_runs import Judged, compare, judged_bundle, locate, row_start
from support.more_faults import MORE_FAULTS, PRECISIONS
from support.sources import ROOT

from angelforge.runtime.validate.compare import first_failure
from angelforge.runtime.validate.engine_graph import Unit
from angelforge.runtime.validate.operations import Operation
from angelforge.runtime.validate.results import describe
from angelforge.runtime.validate.thresholds import thresholds
from angelforge.runtime.validate.walk import compare_stages

PAGE = ROOT / "docs/validation.md"


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Judged]:
    """What the judge computes, once for all faults."""
    return {kind: judged_bundle(kind, tmp_path_factory.mktemp(kind)) for kind in ("fp32", "fp8")}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.name}, {fault.bundle}")
def test_faults_are_located(judged: dict[str, Judged], fault: Fault, tmp_path: Path) -> None:
    """The first diverging tensor is an output of the faulty operator."""
    first = locate(judged[fault.bundle], fault, tmp_path)
    assert first is not None, "not found"
    assert (first.place, first.operator) == (fault.place, fault.operator), "\n".join(describe(first))
    assert first.result.worst or "needs" in first.note
    assert row_start(fault, first) in PAGE.read_text(encoding="utf-8"), "run make faults and put the table there"


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Judged]:
    """The same in all precisions."""
    return {kind: judged_bundle(kind, tmp_path_factory.mktemp(kind)) for kind in PRECISIONS}


@pytest.mark.full
@pytest.mark.parametrize("fault", MORE_FAULTS, ids=lambda fault: f"{fault.name}, {fault.bundle}")
def test_more_faults_are_located(every: dict[str, Judged], fault: Fault, tmp_path: Path) -> None:
    """Small ones, too: one value of one expert."""
    first = locate(every[fault.bundle], fault, tmp_path)
    assert first is not None, "not found"
    assert (first.place, first.operator) == (fault.place, fault.operator), "\n".join(describe(first))


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


@pytest.mark.parametrize("kind", ["fp32", "fp8"])
def test_wrong_wires_are_seen_layer_by_layer(judged: dict[str, Judged], kind: str, tmp_path: Path) -> None:
    """A layer that takes a value of another one cannot be cut out: a failure that names it, and only this layer."""
    fault = next(f for f in FAULTS if f.name == "the cache of another layer" and f.bundle == kind)
    failed = [f for layer in compare(judged[kind], fault, tmp_path, by_layer=True) for f in layer if not f.ok]
    assert {finding.place for finding in failed} == {"layer 1"}
    assert "`kv_cache_out.0`" in failed[0].note


def test_an_operator_that_is_not_shown_fails(judged: dict[str, Judged]) -> None:
    """A candidate that leaves out operators is not taken to be right."""
    fp32 = judged["fp32"]
    limits = thresholds(fp32.bundle.manifest.precision, as_stored=False)
    found = [
        f
        for _, layer in compare_stages(fp32.judge, _Nothing(), fp32.schedule, limits, fp32.walked, by_layer=False)
        for f in layer
    ]
    operations = {(o.place, o.name) for o in fp32.judge.operations if o.kind != "AllReduce"}
    assert {(f.place, f.operator) for f in found if not f.ok} == operations


class _Nothing:
    as_stored = False

    def units(self, operations: Sequence[Operation], whole: bool) -> Iterator[Unit]:
        return iter(())
