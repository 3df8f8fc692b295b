"""`validate BUNDLE --reference` of the toy with its draft, whose graph has outputs and stages of its own."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from support.faults import change_tensor

from angelforge.bundle import Bundle
from angelforge.engines.cpu import build_cpu
from angelforge.exporter.export import ExportOptions, export
from angelforge.precision import Precision
from angelforge.tools.cli import main
from angelforge.tools.toy import DRAFT, MODEL

FEW = ("--random", "1", "--length", "20", "--reference", f"numpy:{MODEL}")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["validate", *map(str, arguments)])


def with_draft(folder: Path, precision: Precision) -> Bundle:
    bundle = export(str(MODEL), folder, ExportOptions(precision=precision, draft=str(DRAFT)))
    build_cpu(bundle)
    return bundle


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The toy and its draft, built."""
    return with_draft(tmp_path_factory.mktemp("toy") / "bundle", Precision.FP8)


def test_sound_bundles_with_a_draft_pass(fp8: Bundle, tmp_path: Path) -> None:
    """FP8 from the embedding to the head; of bf16 the layers whose states the draft takes."""
    result = run(fp8.folder, *FEW, "--json")
    assert result.exit_code == 0, result.output
    places = [half["place"] for half in json.loads(result.stdout)["halves"]]
    assert places[:2] + places[-1:] == ["embedding", "rope.cos", "head"]
    assert {f"layer {number}" for number in range(4)} <= set(places)
    bundle = with_draft(tmp_path / "bundle", Precision.BF16)
    result = run(bundle.folder, *FEW, "--layers", "1,3")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("weight", "change", "place"),
    [
        ("model.layers.3.attention.dense.weight_scale_inv", lambda a: a * np.float32(1.03), "layer 3"),
        pytest.param("lm_head.weight", lambda a: np.roll(a, 1, axis=0), "head", marks=pytest.mark.full),
        pytest.param("rope.cos", lambda a: np.concatenate([a[:15], -a[15:]]), "rope.cos", marks=pytest.mark.full),
    ],
)
def test_a_damaged_weight_is_located(fp8: Bundle, tmp_path: Path, weight: str, change, place: str) -> None:
    """In the layer that the draft takes states of, too."""
    folder = tmp_path / "bundle"
    shutil.copytree(fp8.folder, folder)
    change_tensor(fp8, folder, weight, change)
    result = run(folder, *FEW, "--json")
    assert result.exit_code == 1, result.output
    first = json.loads(result.stdout)["first_diverging"]
    assert (first["place"], "beside the reference" in first["operator"]) == (place, True)
