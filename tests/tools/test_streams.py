"""Commands whose standard streams are closed, or whose terminal lacks a character, do what they do elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from angelforge.exporter.export import ExportOptions, export

ANGELFORGE = f"{sys.executable} -m angelforge.tools"


@pytest.fixture(scope="module")
def bundle(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in a folder whose name other encodings lack."""
    folder = tmp_path_factory.mktemp("streams") / "模型"
    export(small_checkpoint, folder, ExportOptions())
    return folder


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(line, shell=True, env=environment, capture_output=True, check=False, timeout=120)


@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(bundle: Path, tmp_path: Path, closed: str) -> None:
    """A page is written whole, and nothing that is printed gets into a file that took a closed stream's number."""
    pages = [tmp_path / name for name in ("open.html", "closed.html")]
    for page, redirection in zip(pages, ("", closed), strict=True):
        result = shell(f"{ANGELFORGE} inspect '{bundle}' --html {page} {redirection}")
        assert (result.returncode, result.stderr) == (0, b"")
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_chat_without_standard_input(bundle: Path) -> None:
    """A closed standard input has no questions: the chat ends as at its end."""
    assert shell(f"{ANGELFORGE} build '{bundle}'", PYTHONUTF8="1").returncode == 0
    result = shell(f"{ANGELFORGE} run '{bundle}' --chat <&-", PYTHONUTF8="1")
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.parametrize("encoding", ["latin-1", "koi8-r"])
def test_characters_that_the_terminal_lacks(bundle: Path, encoding: str) -> None:
    """They become question marks in what people read, and escapes in JSON, which stays what it is."""
    lines = [f"{ANGELFORGE} inspect '{bundle}' {option}" for option in ("", "--json")]
    told, as_json = (shell(line, PYTHONIOENCODING=encoding, PYTHONUTF8="1") for line in lines)
    assert (told.returncode, told.stderr, as_json.returncode) == (0, b"", 0)
    assert "??: bundle of" in told.stdout.decode(encoding)
    assert json.loads(as_json.stdout.decode(encoding))["path"] == str(bundle)
