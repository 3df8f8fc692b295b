"""Weights arrive on the device byte for byte, aligned, whole or in a rank's part, with a bounded amount of host memory.

The device is a GPU if there is one, else a CPU: the code is the same, its pinned memory is ordinary memory.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from angelforge.dtypes import DType
from angelforge.errors import AngelForgeError
from angelforge.runtime import device_weights, weight_layout
from angelforge.runtime.device import open_device
from angelforge.runtime.device_weights import load_weights
from angelforge.runtime.weight_layout import Slice, Wanted, place_weights
from angelforge.tensorfile import TensorInfo, encode_header, read_tensor, read_tensor_file

DEVICE = open_device("cuda:0" if torch.cuda.is_available() else "cpu")


def write(path: Path, tensors: dict[str, tuple[DType, tuple[int, ...]]], seed: int = 0) -> dict[str, TensorInfo]:
    """A safetensors file of random bytes."""
    data = np.random.default_rng(seed)
    entries = [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    content = [data.bytes(int(np.prod(shape)) * dtype.itemsize) for _, dtype, shape in entries]
    path.write_bytes(encode_header(entries, {}) + b"".join(content))
    return dict(read_tensor_file(path).tensors)


def wanted(tensors: dict[str, TensorInfo]) -> dict[str, Wanted]:
    return {name: Wanted(info.dtype, info.shape) for name, info in tensors.items()}


def as_bytes(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, TensorInfo]:
    first = {"a": (DType.BF16, (3, 5)), "empty": (DType.F32, (0, 4)), "scale": (DType.F32, ())}
    second = {"b": (DType.F8_E4M3, (700, 1001)), "c": (DType.I64, (17,))}
    return write(tmp_path / "1.safetensors", first) | write(tmp_path / "2.safetensors", second, 1)


def test_every_byte_arrives_aligned(tensors: dict[str, TensorInfo], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors smaller and larger than a buffer; progress ends at the whole, in bytes."""
    monkeypatch.setattr(device_weights, "STAGING", 4096)
    told: list[tuple[int, int]] = []
    weights = load_weights(
        place_weights(tensors, wanted(tensors), {}), DEVICE, lambda done, total: told.append((done, total)), readers=3
    )
    for name, info in tensors.items():
        assert weights.address(name) % 256 == 0
        assert weights.bytes_of(name).cpu().numpy().tobytes() == as_bytes(read_tensor(info)), name
    assert told[-1] == (sum(info.nbytes for info in tensors.values()),) * 2


def test_tied_weights_share_their_bytes(tensors: dict[str, TensorInfo]) -> None:
    tied = tensors | {"head": dataclasses.replace(tensors["b"], name="head")}
    layout = place_weights(tied, wanted(tied), {})
    assert layout.nbytes == place_weights(tensors, wanted(tensors), {}).nbytes
    weights = load_weights(layout, DEVICE)
    assert weights.address("head") == weights.address("b")


def test_overlapping_slices_may_keep_more_than_a_row(
    tensors: dict[str, TensorInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_weights, "STAGING", 2048)  # two rows of 1,001 bytes, but not 2 x 1,200
    cuts, need = [Slice(1, 0, 600), Slice(1, 100, 700)], {"b": Wanted(tensors["b"].dtype, (700, 1200))}
    weights = load_weights(place_weights({"b": tensors["b"]}, need, {"b": cuts}), DEVICE)
    full = read_tensor(tensors["b"])
    assert weights.bytes_of("b").cpu().numpy().tobytes() == as_bytes(np.hstack([full[:, :600], full[:, 100:700]]))


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    data=st.data(),
    staging=st.sampled_from([64, 100, 1000, 1 << 20]),
    long_run=st.sampled_from([1, 40, 1 << 20]),
)
def test_a_rank_gets_its_part(
    shape: tuple[int, ...], data: st.DataObject, staging: int, long_run: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any slices of any axis are what NumPy takes, however they are read."""
    axis = data.draw(st.integers(0, len(shape) - 1))
    ranges = data.draw(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 9)), min_size=1, max_size=3))
    cuts = [Slice(axis, start % shape[axis], min(start % shape[axis] + n, shape[axis])) for start, n in ranges]
    found = write(tmp_path_factory.mktemp("rank") / "w.safetensors", {"w": (DType.BF16, shape)})
    full = read_tensor(found["w"])
    expected = np.concatenate([np.take(full, range(cut.start, cut.stop), axis) for cut in cuts], axis)
    layout = place_weights(found, {"w": Wanted(DType.BF16, expected.shape)}, {"w": cuts})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_weights, "STAGING", staging)
        patch.setattr(weight_layout, "_LONG_RUN", long_run)
        weights = load_weights(layout, DEVICE, readers=2)
    assert weights.bytes_of("w").cpu().numpy().tobytes() == as_bytes(expected)


def test_all_mismatches_are_told_at_once(tensors: dict[str, TensorInfo]) -> None:
    needs = wanted(tensors) | {
        "a": Wanted(DType.F32, (3, 5)),
        "b": Wanted(DType.F8_E4M3, (700, 1000)),
        "d": Wanted(DType.BF16, (1,)),
    }
    with pytest.raises(AngelForgeError) as caught:
        place_weights(tensors, needs, {})
    for text in (
        "a is BF16 [3, 5], needed F32 [3, 5]",
        "b is F8_E4M3 [700, 1001], needed F8_E4M3 [700, 1000]",
        "d is missing",
    ):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("cuts", "said"),
    [
        ([Slice(2, 0, 1)], "cannot be cut along the axes"),
        ([Slice(0, 0, 1), Slice(1, 0, 1)], "cannot be cut along the axes"),
        ([Slice(0, 1, 4)], "has no indices 1 to 4 in axis 0"),
        ([Slice(0, 0, 2)], r"a is BF16 \[2, 5\] \(this rank's part\), needed BF16 \[3, 5\]"),
    ],
)
def test_slices_that_do_not_fit_are_told(tensors: dict[str, TensorInfo], cuts: list[Slice], said: str) -> None:
    with pytest.raises(AngelForgeError, match=said):
        place_weights(tensors, wanted(tensors), {"a": cuts})


def test_files_that_changed_are_told(tensors: dict[str, TensorInfo]) -> None:
    """A file shortened after its header was read, and one that has gone."""
    layout, path = place_weights(tensors, wanted(tensors), {}), tensors["b"].path
    path.write_bytes(path.read_bytes()[:-100_000])
    with pytest.raises(AngelForgeError, match=r"2\.safetensors ends at byte \d+, inside a tensor.*Fetch or export"):
        load_weights(layout, DEVICE)
    path.unlink()
    with pytest.raises(AngelForgeError, match="there is no such file"):
        load_weights(layout, DEVICE)


def test_too_little_memory_is_told_before_anything_is_read(
    tensors: dict[str, TensorInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = place_weights(tensors, wanted(tensors), {})
    for path in {info.path for info in tensors.values()}:
        path.unlink()
    monkeypatch.setattr(DEVICE, "free_bytes", lambda: 1000)
    with pytest.raises(AngelForgeError, match=r"need 0\.00 GB of device memory, but 0\.00 GB are free"):
        load_weights(layout, DEVICE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_torch_cannot_use_is_told() -> None:
    with pytest.raises(AngelForgeError, match=r"torch .* cannot use the GPU: .* Install a torch for CUDA 13"):
        open_device("cuda:0")


_MEASURE = """
import resource, sys
from pathlib import Path
from angelforge.runtime.device import open_device
from angelforge.runtime.device_weights import Slice, Wanted, load_weights
from angelforge.runtime.weight_layout import place_weights
from angelforge.tensorfile import read_tensor_file

tensors = read_tensor_file(Path(sys.argv[1])).tensors
info = tensors["w"]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
layout = place_weights(tensors, {"w": Wanted(info.dtype, (info.shape[0], 16))}, {"w": [Slice(1, 32, 48)]})
device = open_device("cpu")
before = peak()
weights = load_weights(layout, device, readers=4)
assert not weights.arena.any()
print((peak() - before) // 1024, layout.nbytes >> 20)
"""


def test_host_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """0.5 GiB goes through readers' buffers: the process grows by those and by what stays on the device (4 MiB)."""
    shape = (1 << 18, 2048)
    header = encode_header([("w", DType.U8, shape)], {})
    path = tmp_path / "w.safetensors"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + shape[0] * shape[1])
    result = subprocess.run([sys.executable, "-c", _MEASURE, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    grown, kept = map(int, result.stdout.split())
    assert kept == 4
    assert grown < 4 * 3 * 16 + 4 + 60  # 4 readers × 3 buffers of 16 MiB, the arena, torch's own
