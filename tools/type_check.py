"""Type checking of the checkout: `python -m angelforge.tools.type_check`.

The folders are subpackages only by setuptools' `package-dir`, which mypy does not read; so mypy is given a folder of
links that has the layout of the installed package, and its messages are printed with the names of the source files.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDERS = ("engines", "exporter", "plugins", "runtime", "tools")  # each is the subpackage angelforge.<folder>


def link_package(source: Path, target: Path) -> None:
    """Make `target/angelforge`: links to the files of `source/angelforge` and to the folders beside it."""
    package = target / "angelforge"
    package.mkdir()
    for file in (source / "angelforge").iterdir():
        (package / file.name).symlink_to(file)
    for folder in FOLDERS:
        (package / folder).symlink_to(source / folder)


def source_names(report: str) -> str:
    """Replace `angelforge/<folder>/` at the start of mypy's lines by `<folder>/`."""
    return re.sub(rf"^angelforge/(?=({'|'.join(FOLDERS)})/)", "", report, flags=re.MULTILINE)


def main() -> int:
    """Run mypy over the checkout that this file belongs to; returns its exit code."""
    source = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as target:
        link_package(source, Path(target))
        command = [sys.executable, "-m", "mypy", "--config-file", str(source / "pyproject.toml")]
        command += ["--cache-dir", str(source / ".mypy_cache"), "-p", "angelforge"]
        result = subprocess.run(command, cwd=target, capture_output=True, text=True, check=False)
    print(source_names(result.stdout), end="")
    print(result.stderr, end="", file=sys.stderr)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
