"""Errors of the operating system as sentences with a remedy."""

import errno
import os
from pathlib import Path

import pytest

from angelforge.diskerrors import disk_error, explained, require_utf8
from angelforge.errors import AngelForgeError, UsageError


@pytest.mark.parametrize(("number", "advice"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "permission denied")])
def test_known_errors_come_with_what_to_do(number, advice):
    error = disk_error("write", Path("a/b"), OSError(number, os.strerror(number)))
    assert str(error).startswith("Cannot write a/b: ") and advice in str(error) and str(error).endswith(".")


@pytest.mark.parametrize("error", [OSError(errno.EXDEV, "Invalid cross-device link"), OSError("odd")])
def test_other_errors_keep_the_words_of_the_system(error):
    assert (error.strerror or "odd") in str(disk_error("read", Path("x"), error))


def test_only_errors_of_the_system_are_translated(tmp_path):
    with pytest.raises(AngelForgeError, match=r"Cannot list .*no such file or folder"), explained("list", tmp_path):
        os.listdir(tmp_path / "absent")
    with pytest.raises(KeyError), explained("list", tmp_path):
        raise KeyError("x")


def test_a_path_that_is_not_utf8_is_wrong_use() -> None:
    """Tokenizers and ONNX Runtime take no such path; it is told before hours of packing, with the bytes escaped."""
    require_utf8(Path("模型 x"))
    with pytest.raises(UsageError, match=r"'b\\udcff' is not valid UTF-8"):
        require_utf8(Path(os.fsdecode(b"b\xff")))
