"""Interrupted packing: the last good state stays, a second call goes on and ends with identical bytes."""

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import support

from angelforge.checkpoint import Checkpoint
from angelforge.errors import AngelForgeError
from angelforge.exporter.layout import bundle_tensors, plan_shards
from angelforge.exporter.packer import pack
from angelforge.exporter.synthetic import small_config, write_checkpoint, write_sparse_checkpoint
from angelforge.precision import Precision

SMALL = small_config(num_hidden_layers=2, num_experts=8)


def plan(checkpoint, precision=Precision.BF16):
    return plan_shards(bundle_tensors(checkpoint.config, precision, 128))


def contents(bundle):
    """Every weight file's bytes."""
    return {path.name: path.read_bytes() for path in sorted((bundle / "weights").glob("*.safetensors"))}


def inodes(bundle):
    return {path.name: path.stat().st_ino for path in (bundle / "weights").glob("*.safetensors")}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("source"), SMALL, tokenizer=False))


@pytest.fixture
def own(source, tmp_path):
    """The same checkpoint in a place of its own, to change."""
    return Checkpoint.open(shutil.copytree(source.folder, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """A finished bundle that no test changes."""
    bundle = tmp_path_factory.mktemp("finished")
    pack(source, plan(source), bundle)
    return contents(bundle)


@pytest.fixture
def packed(source, tmp_path):
    """A finished bundle to change."""
    pack(source, plan(source), tmp_path / "bundle")
    return tmp_path / "bundle"


def test_killed_at_any_point_a_second_call_ends_with_the_same_bytes(source, finished, tmp_path):
    """kill -9 before every single change of the disk; nothing of the killed run remains but finished files."""
    program = Path(support.__file__).with_name("kill_points.py")
    command = [sys.executable, str(program), str(source.folder), "bf16", str(tmp_path / "killed")]
    points = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert points > 30
    kept = 0
    for point in range(points):
        bundle = tmp_path / "killed" / str(point)
        before = inodes(bundle) if (bundle / "weights").exists() else {}
        assert all(contents(bundle)[name] == finished[name] for name in before)
        pack(source, plan(source), bundle)
        assert contents(bundle) == finished
        assert {path.name for path in (bundle / "weights").iterdir()} == {*finished, ".packed.json"}
        kept += len(before.items() & inodes(bundle).items())
    assert kept > points  # finished files are not packed again


def test_a_second_call_touches_nothing(source, packed):
    before = inodes(packed)
    calls = []
    pack(source, plan(source), packed, lambda done, total: calls.append((done, total)))
    assert inodes(packed) == before and {done for done, _ in calls} == {calls[0][1]}


@pytest.mark.parametrize("damage", ["removed", "shortened", "rewritten"])
def test_one_damaged_file_is_packed_again_and_only_it(source, packed, damage):
    before, wanted = inodes(packed), contents(packed)
    path = packed / "weights/layer-001.safetensors"
    raw = path.read_bytes()
    path.unlink()
    if damage != "removed":
        path.write_bytes(raw[:-1] if damage == "shortened" else raw[:-1] + bytes([raw[-1] ^ 1]))
    pack(source, plan(source), packed)
    assert contents(packed) == wanted
    assert {name for name, inode in inodes(packed).items() if before[name] == inode} >= before.keys() - {path.name}


def test_changed_values_of_the_source_are_packed_again(own, tmp_path):
    """Same size and header, another modification time."""
    info, packed = own.tensors["model.norm.weight"], tmp_path / "b"
    pack(own, plan(own), packed)
    before = contents(packed)
    with info.path.open("rb+") as file:
        file.seek(info.offset)
        file.write(b"\x01\x02")
    pack(own, plan(own), packed)
    assert contents(packed)["head.safetensors"] != before["head.safetensors"]


def test_another_layout_is_packed_again(source, packed):
    """bf16 files in the way of fp32 ones are replaced, and back."""
    wanted = contents(packed)
    pack(source, plan(source, Precision.FP32), packed)
    assert sum(map(len, contents(packed).values())) > 1.9 * sum(map(len, wanted.values()))
    pack(source, plan(source), packed)
    assert contents(packed) == wanted


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "files": {"weights/a.safetensors": 1}}']
)
def test_a_damaged_journal_costs_time_only(source, packed, text):
    wanted = contents(packed)
    (packed / "weights/.packed.json").write_text(text)
    pack(source, plan(source), packed)
    assert contents(packed) == wanted


def test_leftovers_of_a_killed_run_are_removed(source, packed):
    (packed / "weights/.layer-000.safetensors.tmp-99999-0123abcd").write_bytes(b"half")
    pack(source, plan(source), packed)
    assert not list((packed / "weights").glob(".layer*"))


def test_a_moved_checkpoint_with_its_times_kept_is_recognised(source, packed, tmp_path):
    before = inodes(packed)
    shutil.copytree(source.folder, tmp_path / "moved")
    pack(Checkpoint.open(tmp_path / "moved"), plan(source), packed)
    assert inodes(packed) == before


def failing(real, error, after):
    """`real`, failing with `error` once it has been called `after` times."""
    calls = []

    def call(*args):
        calls.append(args)
        if len(calls) > after:
            raise OSError(error, os.strerror(error))
        return real(*args)

    return call


@pytest.mark.parametrize("after", [0, 2, 3])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("name", ["pwrite", "fsync"])
def test_a_full_or_broken_disk_is_told_and_finished_files_stay(
    source, finished, tmp_path, monkeypatch, name, error, after
):
    """No half file under a final name; when the disk is well again the same call finishes."""
    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing(getattr(os, name), error, after))
        with pytest.raises(AngelForgeError, match=r"Cannot write .*(disk is full|input/output error)"):
            pack(source, plan(source), tmp_path / "b", workers=1)
    assert all(finished[file] == data for file, data in contents(tmp_path / "b").items())
    assert not list((tmp_path / "b/weights").glob(".*tmp*"))
    pack(source, plan(source), tmp_path / "b")
    assert contents(tmp_path / "b") == finished


def test_a_failing_read_is_told(source, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "preadv", failing(os.preadv, errno.EIO, 3))
    with pytest.raises(AngelForgeError, match=r"Cannot read .*model-0000.*input/output error"):
        pack(source, plan(source), tmp_path / "b")


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="only Linux has direct writes")
@pytest.mark.parametrize("refuses", ["open", "write", "half a write"])
def test_file_systems_without_direct_writes_get_the_same_bytes(source, finished, tmp_path, monkeypatch, refuses):
    """Some refuse at opening, some at the first write, and any may write less than asked."""
    real_open, real_write = os.open, os.pwrite

    def open_(path, flags, *rest, **options):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *rest, **options)

    def pwrite(descriptor, data, offset):
        if os.get_blocking(descriptor) and len(data) % 4096 == 0 and offset == 0 and refuses == "write":
            raise_once()
        return real_write(descriptor, data[: 5000 if refuses == "half a write" and len(data) > 5000 else None], offset)

    def raise_once():
        if not refused:
            refused.append(True)
            raise OSError(errno.EINVAL, "Invalid argument")

    refused = []
    monkeypatch.setattr(os, "open", open_ if refuses == "open" else real_open)
    monkeypatch.setattr(os, "pwrite", pwrite)
    pack(source, plan(source), tmp_path / "b")
    assert contents(tmp_path / "b") == finished
    assert refused == ([True] if refuses == "write" else [])


def test_ctrl_c_ends_soon_and_leaves_nothing_unfinished(source, finished, tmp_path, monkeypatch):
    """An interrupt in the caller's thread stops workers that would still be reading for long."""
    real = os.preadv

    def slow(*args):
        time.sleep(0.05)
        return real(*args)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "preadv", slow)
        pack(source, plan(source), tmp_path / "b", interrupt)
    assert len(contents(tmp_path / "b")) < len(finished)
    assert not list((tmp_path / "b/weights").glob(".*tmp*"))
    pack(source, plan(source), tmp_path / "b")
    assert contents(tmp_path / "b") == finished


def test_a_source_that_changes_while_it_is_read_is_refused(own, tmp_path, monkeypatch):
    """The file that was made of it does not appear."""
    real = os.preadv

    def touching(descriptor, buffers, offset):
        os.utime(own.tensors["model.norm.weight"].path, ns=(0, 0))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", touching)
    with pytest.raises(AngelForgeError, match="changed while"):
        pack(own, plan(own), tmp_path / "b")
    assert not contents(tmp_path / "b").keys() & {"head.safetensors"}


RUN = """
import sys
import time
from pathlib import Path
from angelforge.checkpoint import Checkpoint
from angelforge.exporter.layout import bundle_tensors, plan_shards
from angelforge.exporter.measure import peak_memory
from angelforge.exporter.packer import pack
from angelforge.precision import Precision
checkpoint = Checkpoint.open(sys.argv[1])
shards = plan_shards(bundle_tensors(checkpoint.config, Precision(sys.argv[3]), 128))
pack(checkpoint, shards, Path(sys.argv[2]), workers=2)
print(peak_memory())
"""


@pytest.mark.parametrize(("fp8", "precision"), [(False, "bf16"), (True, "bf16"), (False, "fp8")])
def test_memory_does_not_grow_with_the_model(tmp_path, fp8, precision):
    """Copied, converted and quantised alike: three times the weights, the same peak, far below 1 GB."""
    peaks = []
    for layers in (2, 4):
        raw = small_config(hidden_size=1024, moe_intermediate_size=512, num_experts=16, num_hidden_layers=layers)
        folder = write_sparse_checkpoint(tmp_path / f"c{layers}", raw, fp8=fp8)
        command = [sys.executable, "-c", RUN, str(folder), str(tmp_path / f"b{layers}"), precision]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] < peaks[0] + 30e6
    assert max(peaks) < 400e6
