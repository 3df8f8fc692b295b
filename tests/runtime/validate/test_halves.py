"""Half layers of a bundle beside its checkpoint: sound ones agree, a wrong weight is seen in its own half only."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.built import make_bundle
from support.faults import change_tensor

from angelforge.bundle import Bundle
from angelforge.config import ModelConfig
from angelforge.exporter.export import ExportOptions
from angelforge.exporter.synthetic import small_config
from angelforge.exporter.synthetic_config import FULL_CONFIG
from angelforge.precision import Precision
from angelforge.runtime.validate.halves import Halves, LayerCheck, most_touched
from angelforge.runtime.validate.metrics import by_row
from angelforge.runtime.validate.operations import judge_graph
from angelforge.runtime.validate.references import numpy_reference

SIZES = {"num_hidden_layers": 2, "vocab_size": 320}


@pytest.fixture(scope="module", params=[Precision.FP8, pytest.param(Precision.BF16, marks=pytest.mark.full)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """(checkpoint in f32, bundle that rounds it)."""
    return make_bundle(tmp_path_factory.mktemp("halves"), SIZES, ExportOptions(precision=request.param))


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """The same in FP8 always."""
    return make_bundle(tmp_path_factory.mktemp("halves"), SIZES, ExportOptions(precision=Precision.FP8))


def checks(checkpoint: Path, bundle: Bundle, ids: np.ndarray | None = None) -> dict[tuple[int | None, str], LayerCheck]:
    """Every half of the bundle, and of its embedding the rows of `ids`, too."""
    manifest = bundle.manifest
    reference = numpy_reference(checkpoint, bundle, keep=0)
    quantized = manifest.precision.quantized
    sides = Halves(manifest.model, judge_graph(bundle), bundle.folder, reference, quantized, 64, 64, 0, ids)
    found = [sides.embedding(), *sides.tables(), *sides.layer(0), *sides.layer(1), sides.head()]
    return {(check.layer, check.half): check for check in found}


def test_sound_weights_agree(model: tuple[Path, Bundle]) -> None:
    """Rounded and quantised as the export does it."""
    found = checks(*model)
    assert list(found) == [
        (None, "embedding"),
        (None, "rope.cos"),
        (None, "rope.sin"),
        (0, "attention"),
        (0, "mlp"),
        (1, "attention"),
        (1, "mlp"),
        (None, "head"),
    ]
    assert [check for check in found.values() if not check.ok] == []


def _doubled(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array[:3], 2 * array[3:4], array[4:]])


def _turned(array: np.ndarray) -> np.ndarray:
    return np.roll(array.view(np.uint8 if array.dtype.itemsize == 1 else array.dtype), 1, axis=0).view(array.dtype)


def _negated_later(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array[:100], -array[100:]])


@pytest.mark.parametrize(
    ("weight", "change", "place"),
    [
        ("model.word_embeddings.weight", _turned, (None, "embedding")),
        ("model.layers.0.mlp.down_proj.weight", _turned, (0, "mlp")),
        ("model.layers.1.attention.key_layernorm.weight", _doubled, (1, "attention")),
        ("model.layers.1.mlp.gate.expert_bias", np.negative, (1, "mlp")),
        ("model.layers.1.mlp.experts.gate_proj.weight", _turned, (1, "mlp")),
        ("model.norm.weight", _doubled, (None, "head")),
        ("rope.cos", _negated_later, (None, "rope.cos")),
        ("rope.sin", _negated_later, (None, "rope.sin")),
    ],
)
def test_wrong_weights_are_located(model: tuple[Path, Bundle], tmp_path: Path, weight, change, place) -> None:
    """Whatever reads the bundle reads the same wrong weight; only the checkpoint tells."""
    folder = tmp_path / "bundle"
    shutil.copytree(model[1].folder, folder)
    change_tensor(model[1], folder, weight, change)
    assert [key for key, check in checks(model[0], Bundle.open(folder)).items() if not check.ok] == [place]


def test_rows_of_the_run_are_compared(model: tuple[Path, Bundle], tmp_path: Path) -> None:
    """A wrong row of the embedding that random tokens miss, told by its token."""
    folder = tmp_path / "bundle"
    shutil.copytree(model[1].folder, folder)
    missed = next(i for i in range(320) if i not in np.random.default_rng([0, 1 << 20]).integers(0, 320, 64))

    def change(array: np.ndarray) -> np.ndarray:
        array[missed] *= array.dtype.type(1.5)
        return array

    change_tensor(model[1], folder, "model.word_embeddings.weight", change)
    bundle = Bundle.open(folder)
    assert checks(model[0], bundle)[None, "embedding"].ok
    found = checks(model[0], bundle, np.array([missed, missed, 3]))[None, "embedding"]
    assert not found.ok
    assert {worst.index[0] for worst in found.result.worst} == {missed}


def test_rows_that_are_larger_hide_none() -> None:
    """One element of another token is 3000, and errors of a thousandth of it are whole rows."""
    wanted = np.ones((4, 8))
    wanted[0, 0] = 3000
    found = wanted.copy()
    found[2] = 0
    assert by_row(found, wanted).tolist() == [0, 0, 1, 0]
    assert by_row(np.where(wanted == 3000, np.nan, wanted), wanted).tolist() == [np.inf, 0, 0, 0]


@pytest.mark.parametrize("part", ["dense", "query_key_value"])
def test_small_errors_of_every_token_are_seen_in_fp8(fp8: tuple[Path, Bundle], tmp_path: Path, part: str) -> None:
    """3 %, less than one step of e4m3."""
    folder = tmp_path / "bundle"
    shutil.copytree(fp8[1].folder, folder)
    scale = f"model.layers.1.attention.{part}.weight_scale_inv"
    change_tensor(fp8[1], folder, scale, lambda array: array * np.float32(1.03))
    assert [key for key, check in checks(fp8[0], Bundle.open(folder)).items() if not check.ok] == [(1, "attention")]


def test_wide_layers_have_more_steps(tmp_path: Path) -> None:
    """One token in ten of a small model; in the real shape, where 13 % were seen, up to four."""

    def share(config: dict[str, object], layer: int) -> float:
        return most_touched(ModelConfig.from_dict(config), layer)

    assert share(small_config(), 1) == 0.1
    assert 0.3 < share(FULL_CONFIG, 1) < 0.45
    assert 0.3 < share(FULL_CONFIG, 0) < 0.45
    assert 0.3 < most_touched(ModelConfig.from_dict(FULL_CONFIG), None) < 0.45
