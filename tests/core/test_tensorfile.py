"""Safetensors headers: what the library writes is read, what it would refuse is refused, with a sentence."""

import hashlib
import json
import math

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from angelforge.dtypes import DType
from angelforge.errors import AngelForgeError
from angelforge.tensorfile import encode_header, read_tensor, read_tensor_file

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
names = st.text(st.characters(categories=["L", "N"], include_characters=".-"), min_size=1, max_size=12)
tensor_lists = st.lists(st.tuples(names, st.sampled_from(DType), shapes), unique_by=lambda t: t[0], max_size=6)

GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def write(path, header, data=b"\0" * 24, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(**changes):
    return {"a": {**GOOD["a"], **changes}}


@given(tensor_lists, st.sampled_from([1, 8, 64, 4096]))
def test_a_written_header_is_read_back_and_the_library_agrees(tmp_path_factory, tensors, align):
    """Names, types, shapes and places survive; data starts aligned; `safetensors` finds the same tensors."""
    path = tmp_path_factory.mktemp("t") / "t.safetensors"
    header = encode_header(tensors, {"k": "v"}, align)
    data = np.random.default_rng(0).bytes(sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in tensors))
    path.write_bytes(header + data)
    file = read_tensor_file(path)
    assert len(header) % align == 0 and file.data_start == len(header)
    assert [(t.name, t.dtype, t.shape) for t in file.tensors.values()] == tensors
    assert dict(file.metadata) == {"k": "v"}
    with safetensors.safe_open(path, "np") as other:
        assert set(other.keys()) == set(file.tensors)
        for info in file.tensors.values():
            assert other.get_slice(info.name).get_shape() == list(info.shape)
            assert read_tensor(info).tobytes() == data[info.offset - len(header) :][: info.nbytes]


def test_files_of_the_library_are_read_value_by_value(tmp_path):
    arrays = {"x": np.arange(6.0).reshape(2, 3), "flag": np.array(True), "none": np.zeros((0, 4), np.float16)}
    safetensors.numpy.save_file(arrays, tmp_path / "t.safetensors", {"format": "np"})
    file = read_tensor_file(tmp_path / "t.safetensors")
    assert dict(file.metadata) == {"format": "np"}
    for name, array in arrays.items():
        read = read_tensor(file.tensors[name])
        assert read.shape == array.shape and read.dtype == array.dtype and np.array_equal(read, array)


def test_header_digest_covers_everything_before_the_data(tmp_path):
    path = write(tmp_path / "t", GOOD)
    file = read_tensor_file(path)
    assert file.header_sha256 == hashlib.sha256(path.read_bytes()[: file.data_start]).hexdigest()


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (b"[1]", "not a JSON object"),
        (b"{", "not valid JSON"),
        (b"\xff{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]},"a":{}}', "'a' twice"),
        ({"__metadata__": {"k": 1}, **GOOD}, "__metadata__"),
        ({"__metadata__": [], **GOOD}, "__metadata__"),
        ({"a": 3}, "needs exactly dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": [6]}}, "needs exactly"),
        (entry(more=1), "needs exactly"),
        (entry(dtype="F4"), "unsupported type 'F4'"),
        (entry(dtype=["F32"]), "unsupported type"),
        (entry(shape=[2, -3]), "list of counts"),
        (entry(shape=[2, True]), "list of counts"),
        (entry(shape=6), "list of counts"),
        (entry(shape=[2, 3.0]), "list of counts"),
        (entry(shape=[2, 10**30]), "needs 8000000000000000000000000000000 bytes"),
        (entry(data_offsets=[0, 24, 48]), "expected \\[begin, end\\]"),
        (entry(data_offsets=[24, 0]), "expected \\[begin, end\\]"),
        (entry(data_offsets=[0, 20]), "needs 24 bytes, its offsets hold 20"),
        ({"a\nb": GOOD["a"]}, "cannot be printed"),
        (b'{"\\ud800":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}', "cannot be printed"),
        (entry(data_offsets=[8, 32]), "8 bytes before tensor 'a' belong to no tensor"),
        ({**GOOD, "b": {"dtype": "U8", "shape": [4], "data_offsets": [20, 24]}}, "'b' overlaps"),
        (entry(shape=[3, 3], data_offsets=[0, 36]), "has 24 bytes less|truncated"),
        (entry(shape=[1, 3], data_offsets=[0, 12]), "last 12 bytes belong to no tensor"),
    ],
)
def test_malformed_headers_are_refused(tmp_path, header, problem):
    """Every malformation: one error that names the file and the problem."""
    path = write(tmp_path / "bad.safetensors", header)
    with pytest.raises(AngelForgeError, match=problem) as caught:
        read_tensor_file(path)
    assert str(path) in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("length", [2**63, 100_000_001, 10**6, 100])
def test_wrong_header_lengths_are_refused(tmp_path, length):
    with pytest.raises(AngelForgeError, match="its header claims"):
        read_tensor_file(write(tmp_path / "t", GOOD, length=length))


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = write(tmp_path / "t", GOOD).read_bytes()
    for size in range(len(whole)):
        (tmp_path / "t").write_bytes(whole[:size])
        with pytest.raises(AngelForgeError):
            read_tensor_file(tmp_path / "t")


@given(st.integers(0, 60), st.integers(0, 255))
def test_a_damaged_byte_gives_a_sentence_or_a_consistent_file(tmp_path_factory, position, value):
    """No damage of the header leads to any other exception, or to places outside the file."""
    path = write(tmp_path_factory.mktemp("t") / "t", GOOD)
    raw = bytearray(path.read_bytes())
    raw[position] = value
    path.write_bytes(raw)
    try:
        file = read_tensor_file(path)
    except AngelForgeError:
        return
    assert all(file.data_start <= t.offset and t.offset + t.nbytes <= len(raw) for t in file.tensors.values())


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()])
def test_absent_files_and_folders_are_refused(tmp_path, make):
    make(tmp_path / "t")
    with pytest.raises(AngelForgeError, match="Cannot read"):
        read_tensor_file(tmp_path / "t")


def test_a_file_shortened_after_reading_its_header_is_noticed(tmp_path):
    path = write(tmp_path / "t", GOOD)
    info = read_tensor_file(path).tensors["a"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AngelForgeError, match="shortened"):
        read_tensor(info)


@pytest.mark.parametrize("names", [("a", "a"), ("__metadata__",)])
def test_a_name_cannot_be_used_twice_or_hide_the_metadata(names):
    with pytest.raises(AngelForgeError, match="reserved or used twice"):
        encode_header([(name, DType.F32, ()) for name in names], {})
