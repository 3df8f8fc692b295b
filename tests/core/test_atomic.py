"""Files appear whole or not at all; locks end with their process."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from angelforge.atomic import atomic_file, lock, remove_leftovers, write_atomic
from angelforge.errors import AngelForgeError

HOLD = "import sys, time; from pathlib import Path; from angelforge.atomic import lock\n"
HOLD += "with lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("data", ["grün", b"\x00\xff", ""])
def test_content_is_replaced_and_nothing_else_remains(tmp_path, data):
    (tmp_path / "f").write_text("old")
    write_atomic(tmp_path / "f", data)
    assert (tmp_path / "f").read_bytes() == (data if isinstance(data, bytes) else data.encode())
    assert os.listdir(tmp_path) == ["f"]


def test_a_failed_block_leaves_the_old_content(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "f") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "f").read_text() == "old" and os.listdir(tmp_path) == ["f"]


def test_the_new_content_is_synced_before_it_is_visible(tmp_path, monkeypatch):
    """After a power cut a renamed file must not be empty: fsync comes first, then the rename."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    write_atomic(tmp_path / "f", "x")
    assert calls == ["fsync", "replace", "fsync"]


def test_a_full_disk_is_told_and_harmless(tmp_path, monkeypatch):
    (tmp_path / "f").write_text("old")

    def full(self, data):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(AngelForgeError, match="disk is full"):
        write_atomic(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old" and os.listdir(tmp_path) == ["f"]


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(AngelForgeError, match="no such file or folder"):
        write_atomic(tmp_path / "absent" / "f", "x")


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    """What a killed writer leaves goes; files of other names stay."""
    for name in ("f", ".hidden", "f.tmp-1-00000000", ".f.tmp-12-0123456789"):
        (tmp_path / name).touch()
    with atomic_file(tmp_path / "f") as temporary:
        temporary.touch()
        assert remove_leftovers(tmp_path) == [temporary]
        temporary.touch()
    assert remove_leftovers(tmp_path) == [] and len(os.listdir(tmp_path)) == 4
    assert remove_leftovers(tmp_path / "absent") == []


def test_a_held_lock_is_refused_and_its_holder_named(tmp_path, holder):
    with (
        pytest.raises(AngelForgeError, match=rf"in use by another process \(pid {holder.pid}\)"),
        lock(tmp_path / ".lock"),
    ):
        pass
    assert holder.poll() is None


def test_a_killed_holder_leaves_no_lock(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lock(tmp_path / ".lock"):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    assert os.listdir(tmp_path) == []


def test_two_holders_never_meet(tmp_path):
    """Although the lock file is removed at every release, no two threads are inside at once."""
    inside, most, entered = [], [], []

    def work():
        for _ in range(200):
            try:
                with lock(tmp_path / ".lock"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                    entered.append(1)
            except AngelForgeError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and entered


def test_a_lock_in_a_missing_folder_is_told(tmp_path):
    with pytest.raises(AngelForgeError, match="Cannot lock"), lock(tmp_path / "absent" / ".lock"):
        pass
