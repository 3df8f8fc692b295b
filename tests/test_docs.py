"""What README and docs show works: their examples are run, their links lead somewhere, their tables are complete.

A fenced block marked `console` is run line by line (the lines that begin with `$ `), one marked `python` as a
program, all blocks of a page in order in one folder, where `AntAngelMed` is a small checkpoint and `AntAngelMed-EAGLE3`
a random draft for it. Blocks marked `sh` or `text` are only shown.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from support.sources import ROOT

from angelforge.exporter.synthetic_draft import write_draft
from angelforge.tools.cli import main

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("**/*.md"))]


@dataclass(frozen=True)
class Example:
    """A block of a page that is run."""

    place: str
    command: list[str] | str


def examples(page: Path) -> list[Example]:
    """The blocks of a page that are run: each line of a console block and each Python block is one."""
    found = []
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(console|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        place = f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}"
        if match[1] == "python":
            found.append(Example(place, [sys.executable, "-c", match[2]]))
        else:
            lines = match[2].replace("\\\n", " ").splitlines()
            found += [Example(place, line[2:]) for line in lines if line.startswith("$ ")]
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.name)
def test_examples_work(page: Path, small_checkpoint: Path, tmp_path: Path) -> None:
    """Every example of a page ends with code 0, in the order in which a reader would try them."""
    shutil.copytree(small_checkpoint, tmp_path / "AntAngelMed")
    write_draft(tmp_path / "AntAngelMed-EAGLE3", small_checkpoint)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for example in examples(page):
        result = subprocess.run(
            example.command,
            shell=isinstance(example.command, str),
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{example.place}: {example.command}\n{result.stdout}{result.stderr}"


def test_readme_has_examples() -> None:
    """The README shows the way from a checkpoint to text on the command line and in Python."""
    shown = examples(ROOT / "README.md")
    commands = " ".join(example.command for example in shown if isinstance(example.command, str))
    assert all(f"angelforge {name} " in commands for name in ("export", "build", "run"))
    assert any(isinstance(example.command, list) for example in shown)


def test_readme_lists_the_commands() -> None:
    """The README's table names every command that exists and no other, in the same order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Commands")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == main.list_commands(click.Context(main))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file that exists."""
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_examples_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of pages sees console lines, continued lines and programs, and leaves other blocks alone."""
    page = tmp_path / "page.md"
    page.write_text("```console\n$ a \\\n  b\nshown\n$ c\n```\n```sh\nd\n```\n```python\ne = 1\n```\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    commands = [example.command for example in examples(page)]
    assert commands == ["a    b", "c", [sys.executable, "-c", "e = 1\n"]]
