"""The project's own source files, as the tests of layout and style see them."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("angelforge", "plugins", "exporter", "engines", "runtime", "tools")


@dataclass(frozen=True)
class Source:
    """A Python file: its name from the root, the module it becomes, its text and tree."""

    name: str
    module: str
    text: str
    tree: ast.Module

    @classmethod
    def read(cls, file: Path) -> "Source":
        """Read one file of the checkout."""
        parts = file.relative_to(ROOT).with_suffix("").parts
        package = parts if parts[0] in ("angelforge", "tests") else ("angelforge", *parts)
        module = ".".join(package[:-1] if package[-1] == "__init__" else package)
        text = file.read_text(encoding="utf-8")
        return cls(str(file.relative_to(ROOT)), module, text, ast.parse(text))


def package_sources() -> list[Source]:
    """All files of the package, in a fixed order."""
    return [Source.read(file) for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]


def sources_of_tests() -> list[Source]:
    """All files of the tests, in a fixed order."""
    return [Source.read(file) for file in sorted((ROOT / "tests").rglob("*.py"))]


def imported_modules(source: Source) -> Iterator[tuple[int, str]]:
    """Line and full module name of every import, also those inside functions and under TYPE_CHECKING."""
    package = source.module.split(".")
    if not source.name.endswith("__init__.py"):
        package = package[:-1]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from angelforge import runtime` imports angelforge.runtime
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
