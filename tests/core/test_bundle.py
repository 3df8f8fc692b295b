"""A bundle is opened only if it is what its manifest says; verifying sees every byte."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from angelforge.bundle import Bundle, FileRecord, Manifest, record_file
from angelforge.config import ModelConfig
from angelforge.dtypes import DType
from angelforge.errors import AngelForgeError
from angelforge.exporter.synthetic_config import small_config
from angelforge.precision import Precision
from angelforge.tensorfile import encode_header

MODEL = ModelConfig.from_dict(small_config()).with_rope_scaling("yarn:4")
HEAD = "weights/head.safetensors"


def manifest(files, **changes):
    facts = {
        "producer": "angelforge 0.1.0",
        "model": MODEL,
        "precision": Precision.BF16,
        "page_size": 64,
        "max_context": 2048,
        "operators": {"Linear": 1},
        "graphs": {"target": "model.onnx"},
        "weights": "packed",
        "files": files,
    }
    return Manifest(**(facts | changes))


@pytest.fixture
def folder(tmp_path):
    """A bundle of one graph and one weight file."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"graph")
    header = encode_header([("model.norm.weight", DType.BF16, (4,)), ("lm_head.weight", DType.BF16, (2, 4))], {})
    (tmp_path / HEAD).write_bytes(header + np.random.default_rng(0).bytes(24))
    manifest({name: record_file(tmp_path / name) for name in ("model.onnx", HEAD)}).write(tmp_path)
    return tmp_path


def flip(path, position):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def test_what_is_written_is_read_back(folder):
    bundle = Bundle.open(str(folder))
    assert bundle.folder == folder and bundle.weights_present
    assert bundle.manifest == manifest(bundle.manifest.files)
    assert bundle.tensors["lm_head.weight"].shape == (2, 4)
    assert bundle.tensors["lm_head.weight"].path == folder / HEAD
    bundle.require_weights()
    bundle.verify()


def test_the_file_tells_what_the_model_implies(folder):
    """Digest and rope stand in the file for readers that do not know the project."""
    written = json.loads((folder / "angelforge.json").read_text())
    assert written["format"] == 1 and written["model_digest"] == MODEL.digest()
    assert written["rope"] == {"factor": 4.0, "attention_factor": MODEL.rope_scaling.attention_factor, "rotary_dim": 16}
    assert set(written["files"][HEAD]) == {"size", "sha256", "header_sha256"}
    assert set(written["files"]["model.onnx"]) == {"size", "sha256"}


def test_a_tied_head_is_found_in_the_embedding(tmp_path):
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights/embeddings.safetensors"
    file.write_bytes(encode_header([("model.word_embeddings.weight", DType.F32, (1, 1))], {}) + bytes(4))
    tied = dataclasses.replace(MODEL, tie_word_embeddings=True)
    files = {"weights/embeddings.safetensors": record_file(file)}
    manifest(files, model=tied, graphs={}).write(tmp_path)
    tensors = Bundle.open(tmp_path).tensors
    assert tensors["lm_head.weight"].offset == tensors["model.word_embeddings.weight"].offset
    assert tensors["lm_head.weight"].name == "lm_head.weight"


def test_a_bundle_without_weights_says_how_to_add_them(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"graph")
    manifest({"model.onnx": record_file(tmp_path / "model.onnx")}, weights="absent").write(tmp_path)
    bundle = Bundle.open(tmp_path)
    assert not bundle.weights_present and not bundle.tensors
    with pytest.raises(AngelForgeError, match=r"--graph-only.*angelforge export CHECKPOINT"):
        bundle.require_weights()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / HEAD).unlink(), f"{HEAD} is missing"),
        (lambda f: (f / "model.onnx").write_bytes(b"graphs"), "model.onnx has 6 bytes, expected 5"),
        (lambda f: flip(f / HEAD, 12), f"(header of {HEAD} is not the one|is not a usable safetensors file)"),
        (lambda f: flip(f / HEAD, 200), f"(header of {HEAD} is not the one|is not a usable safetensors file)"),
        (lambda f: (f / "angelforge.json").unlink(), "not a finished bundle"),
        (lambda f: (f / "angelforge.json").write_text("{"), "not valid JSON"),
    ],
)
def test_a_bundle_that_differs_from_its_manifest_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(AngelForgeError, match=message):
        Bundle.open(folder)


def test_a_weight_file_of_equal_size_and_other_tensors_is_refused(folder):
    data = (folder / HEAD).read_bytes()
    (folder / HEAD).write_bytes(data.replace(b"lm_head.weight", b"xx_head.weight"))
    with pytest.raises(AngelForgeError, match=r"header of weights/head\.safetensors is not the one that was exported"):
        Bundle.open(folder)


def test_places_that_are_no_bundles_are_told_apart(tmp_path):
    with pytest.raises(AngelForgeError, match="There is no bundle at"):
        Bundle.open(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AngelForgeError, match=r"is a checkpoint, a bundle was expected.*angelforge export"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", HEAD])
def test_verify_sees_one_flipped_bit(folder, name):
    """Also where names, sizes and headers are right."""
    flip(folder / name, -1)
    bundle = Bundle.open(folder)
    with pytest.raises(AngelForgeError, match=f"1 of 2 files .*: {name}"):
        bundle.verify()


def test_verify_reports_progress_up_to_the_whole(folder):
    calls = []
    Bundle.open(folder).verify(lambda done, total: calls.append((done, total)))
    total = 5 + (folder / HEAD).stat().st_size
    assert calls[-1] == (total, total) and calls == sorted(calls)


def test_many_problems_are_counted_and_shortened(folder):
    files = {f"file{i}": FileRecord(1, "0" * 64) for i in range(9)} | dict(Manifest.read(folder).files)
    manifest(files).write(folder)
    with pytest.raises(AngelForgeError, match="file0 is missing; file1 is missing; file2 is missing and 6 more"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 2, "format version 2, this program reads version 1"),
        ("format", "1", 'format is "1"'),
        ("precision", "int4", "precision"),
        ("precision", ["bf16"], "precision"),
        ("weights", "absent", "says weights absent"),
        ("page_size", 0, "page_size is 0"),
        ("page_size", True, "page_size is true"),
        ("model_digest", "0", "model_digest"),
        ("rope", {"factor": 1}, "rope is"),
        ("operators", {"Linear": "1"}, "Linear"),
        ("graphs", {"target": "other.onnx"}, "no digest of the graph other.onnx"),
        ("files", {"../x": {"size": 1, "sha256": "0" * 64}}, "not inside the bundle"),
        ("files", {"/x": {"size": 1, "sha256": "0" * 64}}, "not inside the bundle"),
        ("files", {"x": {"size": 1, "sha256": "0" * 63}}, "sha256"),
        ("files", {"x": {"size": -1, "sha256": "0" * 64}}, "size is -1"),
        ("files", {"x": {"size": 1, "sha256": "0" * 64, "mode": 1}}, "unknown keys: mode"),
        ("files", [], "files"),
        ("colour", "red", "unknown keys: colour"),
    ],
)
def test_wrong_manifests_are_refused_by_key(folder, key, value, message):
    raw = json.loads((folder / "angelforge.json").read_text()) | {key: value}
    (folder / "angelforge.json").write_text(json.dumps(raw))
    with pytest.raises(AngelForgeError, match=message):
        Manifest.read(folder)


WRITTEN = json.loads(manifest({"model.onnx": FileRecord(1, "0" * 64)}, weights="absent").to_json())
values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just([]) | st.just({})


def paths(value, prefix=()):
    """The place of every value in nested objects."""
    if prefix:
        yield prefix
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, (*prefix, key))


def without_nulls(value):
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return value


# Inside `model` the configuration's own reader decides; the digest guards what it lets through.
OWN = [path for path in paths(WRITTEN) if path[0] != "model" or len(path) == 1]


@given(st.sampled_from(OWN), values, st.booleans())
def test_a_changed_manifest_is_refused_or_read_as_it_stands(path, value, remove):
    """Whatever is replaced or removed: a clear error, or a manifest that says exactly what the file says."""
    raw = copy.deepcopy(WRITTEN)
    place = raw
    for key in path[:-1]:
        place = place[key]
    if remove:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    try:
        read = Manifest.from_dict(raw)
    except AngelForgeError:
        return
    assert without_nulls(json.loads(read.to_json())) == without_nulls(raw)
