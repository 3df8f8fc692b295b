"""`.ci/setup` touches nothing when all is ready, and says what to do where Python cannot make the environment."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.sources import ROOT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with a space in its name that holds what set-up reads."""
    folder = tmp_path / "a folder"
    (folder / ".ci").mkdir(parents=True)
    for name in (".ci/setup", "pyproject.toml", "constraints.txt", "Makefile"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def setup(checkout: Path, python: str, *extra: str) -> subprocess.CompletedProcess[str]:
    """Run the set-up from another folder, with the given Python."""
    environment = {**os.environ, "PYTHON": python}
    command = [str(checkout / ".ci" / "setup"), *extra]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)


def make_ready(checkout: Path, stamp: str) -> None:
    """Pretend that the set-up has been done."""
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to(sys.executable)
    state = 'echo "$(cat pyproject.toml constraints.txt | cksum) $(pwd)"'
    result = subprocess.run(state, shell=True, cwd=checkout, capture_output=True, text=True, check=True)
    (checkout / ".venv" / stamp).write_text(result.stdout)


def fake_python(checkout: Path, script: str) -> str:
    """An interpreter that does what the script says."""
    file = checkout / "python"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return str(file)


@pytest.mark.parametrize(
    ("stamp", "extra"),
    [
        ("ready", ()),
        ("ready-dev", ("dev",)),
        ("ready-dev", ()),
        ("ready-full", ("dev",)),
        ("ready-full", ("full",)),
    ],
)
def test_nothing_is_done_twice(checkout: Path, stamp: str, extra: tuple[str, ...]) -> None:
    """With a current stamp no Python is looked for and no network used; the tests' set-up serves the demo as well."""
    make_ready(checkout, stamp)
    result = setup(checkout, "/not/there", *extra)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("change", ["pyproject.toml", "constraints.txt", "place", "extra", "interpreter"])
def test_changes_are_seen(checkout: Path, change: str) -> None:
    """Other versions, a moved folder, more that is needed, a Python that is gone: each asks for a new set-up."""
    make_ready(checkout, "ready")
    extra = ("dev",) if change == "extra" else ()
    if change == "place":
        checkout = checkout.rename(checkout.with_name("moved"))
    elif change == "interpreter":
        (checkout / ".venv" / "bin" / "python").unlink()
    elif change != "extra":
        (checkout / change).write_text("# other versions\n")
    result = setup(checkout, "/not/there", *extra)
    assert result.returncode == 1
    assert f"needs Python {'3.11' if extra else '3.10'} or newer; '/not/there' is" in result.stderr


def test_old_python(checkout: Path) -> None:
    """An older Python is named with its version, and how to name another."""
    result = setup(checkout, fake_python(checkout, '[ "$1" = --version ] && echo "Python 3.8.18" || exit 1'))
    assert result.returncode == 1
    assert "is Python 3.8.18" in result.stderr
    assert "make PYTHON=" in result.stderr


def test_python_without_venv(checkout: Path) -> None:
    """Debian's python3 without python3-venv: the package to install is named."""
    result = setup(checkout, fake_python(checkout, 'case "$2" in *ensurepip*) exit 1;; esac'))
    assert result.returncode == 1
    assert "apt-get install python3-venv" in result.stderr


@pytest.mark.parametrize("way", ["inside", "-C", "-f"])
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_works_from_any_directory(checkout: Path, way: str) -> None:
    """`make`, `make -C FOLDER` and `make -f FOLDER/Makefile` all work in the Makefile's folder."""
    command = {"inside": [], "-C": ["-C", str(checkout)], "-f": ["-f", str(checkout / "Makefile")]}[way]
    where = checkout if way == "inside" else Path("/")
    result = subprocess.run(["make", "-n", *command, "demo"], cwd=where, capture_output=True, text=True, check=True)
    assert f'cd "{checkout}" && .ci/setup' in result.stdout
