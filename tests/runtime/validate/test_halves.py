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
from angelforge.runtime.validate.operations import judge_graph
from angelforge.runtime.validate.references import numpy_reference

SIZES = {"num_hidden_layers": 2, "vocab_size": 320}


@pytest.fixture(scope="module", params=[Precision.FP8, pytest.param(Precision.BF16, marks=pytest.mark.full)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """(checkpoint in f32, bundle that rounds it)."""
    return make_bundle(tmp_path_factory.mktemp("halves"), SIZES, ExportOptions(precision=request.param))


def checks(checkpoint: Path, bundle: Bundle) -> dict[tuple[int | None, str], LayerCheck]:
    """Every half of the bundle."""
    manifest = bundle.manifest
    reference = numpy_reference(checkpoint, bundle, keep=0)
    quantized = manifest.precision.quantized
    sides = Halves(manifest.model, judge_graph(bundle), bundle.folder, reference, quantized, 64, 64, 0)
    found = [sides.embedding(), *sides.layer(0), *sides.layer(1), sides.head()]
    return {(check.layer, check.half): check for check in found}


def test_sound_weights_agree(model: tuple[Path, Bundle]) -> None:
    """Rounded and quantised as the export does it."""
    found = checks(*model)
    assert list(found) == [
        (None, "embedding"),
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


@pytest.mark.parametrize(
    ("weight", "change", "place"),
    [
        ("model.word_embeddings.weight", _turned, (None, "embedding")),
        ("model.layers.0.mlp.down_proj.weight", _turned, (0, "mlp")),
        ("model.layers.1.attention.key_layernorm.weight", _doubled, (1, "attention")),
        ("model.layers.1.mlp.gate.expert_bias", np.negative, (1, "mlp")),
        ("model.layers.1.mlp.experts.gate_proj.weight", _turned, (1, "mlp")),
        ("model.norm.weight", _doubled, (None, "head")),
    ],
)
def test_wrong_weights_are_located(model: tuple[Path, Bundle], tmp_path: Path, weight, change, place) -> None:
    """Whatever reads the bundle reads the same wrong weight; only the checkpoint tells."""
    folder = tmp_path / "bundle"
    shutil.copytree(model[1].folder, folder)
    change_tensor(model[1], folder, weight, change)
    assert [key for key, check in checks(model[0], Bundle.open(folder)).items() if not check.ok] == [place]


def test_wide_layers_have_more_steps(tmp_path: Path) -> None:
    """One token in ten of a small model; in the real shape, where 13 % were seen, up to four."""

    def share(config: dict[str, object], layer: int) -> float:
        return most_touched(ModelConfig.from_dict(config), layer)

    assert share(small_config(), 1) == 0.1
    assert 0.3 < share(FULL_CONFIG, 1) < 0.45
    assert 0.3 < share(FULL_CONFIG, 0) < 0.45
