"""Planted faults are found, and located at the layer and operator where they arise; without a fault nothing is."""

from pathlib import Path

import pytest
from support.faults import FAULTS, Fault
from support.faulty_runs import Judged, compare, judged_bundle, locate, row_start
from support.sources import ROOT

from angelforge.runtime.validate.compare import first_failure
from angelforge.runtime.validate.results import describe

PAGE = ROOT / "docs/validation.md"


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Judged]:
    """What the judge computes, once for all faults."""
    return {kind: judged_bundle(kind, tmp_path_factory.mktemp(kind)) for kind in ("fp32", "fp8")}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_are_located(judged: dict[str, Judged], fault: Fault, tmp_path: Path) -> None:
    """The first diverging tensor is an output of the faulty operator."""
    first = locate(judged[fault.bundle], fault, tmp_path)
    assert first is not None, "not found"
    assert (first.place, first.operator) == (fault.place, fault.operator), "\n".join(describe(first))
    assert first.result.worst
    assert row_start(fault, first) in PAGE.read_text(encoding="utf-8"), "run make faults and put the table there"


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
