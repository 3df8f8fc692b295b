"""No value that a weight cannot have gets into a bundle, whatever is copied or converted; it is named and placed."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from angelforge.checkpoint import Checkpoint
from angelforge.draft_checkpoint import DraftCheckpoint
from angelforge.dtypes import DType
from angelforge.errors import AngelForgeError
from angelforge.exporter import damage
from angelforge.exporter.export import ExportOptions, export
from angelforge.exporter.openfiles import OpenFiles
from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.exporter.synthetic_draft import small_draft_config, write_draft
from angelforge.precision import Precision
from angelforge.tensorfile import TensorInfo

CONFIG = small_config(num_experts=8, num_hidden_layers=3)
UP = "model.layers.1.mlp.experts.3.up_proj.weight"
DENSE = "model.layers.0.attention.dense.weight"
KEY = "midlayer.self_attn.k_proj.weight"
SCALE = "_scale_inv"
NAN_CODE = b"\xff"


def f32(value: float) -> bytes:
    return np.float32(value).tobytes()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets `FP8` and `BF16`, and the target's drafts `FP8-draft` and `BF16-draft`."""
    folder = tmp_path_factory.mktemp("source")
    for dtype in ("FP8", "BF16"):
        write_checkpoint(folder / dtype, CONFIG, dtype=dtype)
        write_draft(folder / f"{dtype}-draft", folder / dtype, small_draft_config(CONFIG, head_dim=64), dtype=dtype)
    return folder


def overwrite(info: TensorInfo, index: int, data: bytes) -> None:
    """Puts `data` in the place of the element `index` of a stored tensor."""
    with info.path.open("rb+") as file:
        file.seek(info.offset + index * info.dtype.itemsize)
        file.write(data)


#: (stored types, in the draft?, tensor, flat index of an element, its bytes, what is told)
DAMAGES = [
    ("FP8", False, UP + SCALE, 1, f32(np.nan), r"up_proj\.weight_scale_inv at \[0, 1\] is nan, but a scale is"),
    ("FP8", False, UP + SCALE, 0, f32(-1), r"weight_scale_inv at \[0, 0\] is -1, but a scale is finite and above 0"),
    ("FP8", False, DENSE + SCALE, 3, f32(np.inf), r"dense\.weight_scale_inv at \[1, 1\] is inf"),
    ("FP8", False, DENSE + SCALE, 2, f32(0), r"dense\.weight_scale_inv at \[1, 0\] is 0, but the weights of its block"),
    ("FP8", False, UP, 300, NAN_CODE, r"experts\.3\.up_proj\.weight at \[1, 44\] is nan, which no weight can be"),
    ("FP8", False, "lm_head.weight", 257, b"\xc0\x7f", r"lm_head\.weight at \[1, 1\] is nan"),
    ("FP8", False, "model.norm.weight", 9, b"\x80\xff", r"model\.norm\.weight at \[9\] is -inf"),
    ("FP8", True, KEY + SCALE, 3, f32(np.nan), r"draft\.midlayer\.self_attn\.k_proj\.weight_scale_inv at \[0, 3\] is"),
    ("FP8", True, KEY, 513, b"\x7f", r"draft\.midlayer\.self_attn\.k_proj\.weight at \[1, 1\] is nan"),
    ("FP8", True, "fc.weight" + SCALE, 0, f32(-2), r"draft\.fc\.weight_scale_inv at \[0, 0\] is -2"),
    ("BF16", True, "lm_head.weight", 0, b"\xc0\x7f", r"draft\.lm_head\.weight at \[0, 0\] is nan"),
    (
        "BF16",
        False,
        "model.layers.2.input_layernorm.weight",
        5,
        b"\x80\x7f",
        r"input_layernorm\.weight at \[5\] is inf",
    ),
]


@pytest.mark.parametrize("precision", [Precision.FP8, Precision.BF16])
@pytest.mark.parametrize(("stored", "drafted", "name", "index", "data", "message"), DAMAGES)
def test_damage_is_refused(
    source: Path,
    tmp_path: Path,
    precision: Precision,
    stored: str,
    drafted: bool,
    name: str,
    index: int,
    data: bytes,
    message: str,
) -> None:
    """In every precision of the bundle, with tensor and position; nothing of the bundle stays that is not finished."""
    checkpoint = Path(shutil.copytree(source / stored, tmp_path / "checkpoint"))
    draft = Path(shutil.copytree(source / f"{stored}-draft", tmp_path / "draft"))
    opened = Checkpoint.open(checkpoint)
    found = DraftCheckpoint.open(str(draft), opened.config) if drafted else opened
    overwrite(found.tensors[name], index, data)
    with pytest.raises(AngelForgeError, match=message):
        export(str(checkpoint), tmp_path / "bundle", ExportOptions(precision=precision, draft=str(draft)))
    left = [path.name for path in (tmp_path / "bundle").rglob("*") if path.is_file()]
    assert not (tmp_path / "bundle").exists() or any(name.endswith(".safetensors") for name in left)
    assert "angelforge.json" not in left


def test_a_block_of_zeros_may_have_the_scale_zero(source: Path, tmp_path: Path) -> None:
    """Some quantisers write the largest absolute value / 448, whatever it is; -0 is 0."""
    checkpoint = Checkpoint.open(Path(shutil.copytree(source / "FP8", tmp_path / "checkpoint")))
    weight = checkpoint.tensors[DENSE]
    for row in range(128, weight.shape[0]):
        overwrite(weight, row * weight.shape[1], bytes([0, 0x80] * 64))
    overwrite(checkpoint.tensors[DENSE + SCALE], 2, f32(0))
    for precision in (Precision.FP8, Precision.BF16):
        export(str(checkpoint.folder), tmp_path / precision.value, ExportOptions(precision=precision))


def test_all_that_is_not_finite_is_found_and_nothing_else() -> None:
    """All values of 8 and 16 bits by themselves, as their types' own conversion to f64 sees them."""
    for dtype in (DType.F8_E4M3, DType.BF16, DType.F16):
        bits = np.arange(256**dtype.itemsize, dtype=f"u{dtype.itemsize}")
        with np.errstate(invalid="ignore"):
            finite = np.isfinite(bits.view(dtype.numpy).astype(np.float64))
        found = [damage.first_not_finite(each.view(np.uint8), dtype) for each in bits[:, None]]
        np.testing.assert_array_equal([index is None for index in found], finite)


@given(at=st.integers(0, 400_000), size=st.integers(1, 400_001), sign=st.sampled_from([0, 0x80]))
def test_the_first_is_found_wherever_it_stands(at: int, size: int, sign: int) -> None:
    codes = np.full(size, 0x7E | sign, np.uint8)
    codes[at:] |= 0x7F
    info = TensorInfo("w", DType.F8_E4M3, (1, size), Path("w"), 0, size)
    with OpenFiles() as files:
        if at >= size:
            damage.refuse_damage(info, codes, 0, files, None)
            return
        with pytest.raises(AngelForgeError, match=rf"w at \[0, {at}\] is nan"):
            damage.refuse_damage(info, codes, 0, files, None)
