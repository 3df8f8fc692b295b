"""The layout: what is a package, who may import whom, and the limits of the house."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.sources import FOLDERS, ROOT, Source, imported_modules, package_sources, sources_of_tests

SOURCES = package_sources()
TESTS = sources_of_tests()

# What each part may import of the project besides itself (DESIGN.md).
MAY_IMPORT = {
    "core": set(),
    "plugins": {"core"},
    "exporter": {"core", "plugins"},
    "engines": {"core", "plugins"},
    "runtime": {"core", "plugins", "engines"},
    "tools": {"core", "plugins", "exporter", "engines", "runtime"},
}
MAX_LINES, MAX_FUNCTION_LINES = 400, 60
FORBIDDEN_IMPORTS = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load"}


def part(module: str) -> str | None:
    """Part of the project that a module belongs to; None for the modules of others."""
    names = module.split(".")
    if names[0] != "angelforge":
        return None
    return names[1] if len(names) > 1 and names[1] in MAY_IMPORT else "core"


def wrong_directions(source: Source) -> list[str]:
    """The imports of a file that its part may not have."""
    own = part(source.module)
    assert own
    found = []
    for line, module in imported_modules(source):
        other = part(module)
        lazily = source.name == "angelforge/__init__.py" and module.startswith(
            "angelforge.runtime."
        )  # for type checkers
        if other and other != own and other not in MAY_IMPORT[own] and not lazily:
            found.append(f"{source.name}:{line}: {own} may not import {other} ({module})")
    return found


def test_import_directions() -> None:
    """No part imports one that it may not know: stages meet in the bundle, not in each other's code."""
    assert [line for source in SOURCES for line in wrong_directions(source)] == []


@pytest.mark.parametrize(
    ("name", "text", "wrong"),
    [
        ("runtime/a.py", "from angelforge.exporter import model", 1),
        ("runtime/a.py", "from angelforge import exporter", 1),
        ("runtime/a.py", "def f():\n  import angelforge.exporter.model", 1),
        ("runtime/a.py", "from ..exporter.model import x", 1),
        ("runtime/validate/a.py", "from ...exporter.model import x", 1),
        ("runtime/validate/a.py", "from ..pages import x", 0),
        ("angelforge/a.py", "from angelforge.plugins import x", 1),
        ("angelforge/a.py", "from .errors import x", 0),
        ("exporter/a.py", "from angelforge.errors import x\nfrom angelforge.plugins.linear import y\nimport numpy", 0),
        ("tools/a.py", "import angelforge.exporter.model, angelforge.runtime.llm", 0),
        ("plugins/linear/__init__.py", "from ..body import x\nfrom . import y", 0),
    ],
)
def test_directions_are_seen(name: str, text: str, wrong: int) -> None:
    """The test above sees absolute, relative and late imports."""
    parts = Path(name).with_suffix("").parts
    names = parts if parts[0] == "angelforge" else ("angelforge", *parts)
    module = ".".join(names[:-1] if names[-1] == "__init__" else names)
    assert len(wrong_directions(Source(name, module, text, ast.parse(text)))) == wrong


def test_triton_is_imported_by_kernels_only() -> None:
    """Only kernels, the device functions that they share, their compiler, and what takes a GPU's place do."""
    allowed = re.compile(r"(plugins/(\w+/kernel|device/\w+|sampling/\w+|compile)|tools/no_triton)\.py")
    found = [
        f"{source.name}:{line}"
        for source in SOURCES
        for line, module in imported_modules(source)
        if module.split(".")[0] == "triton" and not allowed.fullmatch(source.name)
    ]
    assert found == []


def test_packages_of_pyproject_are_the_folders() -> None:
    """The list in pyproject.toml names every folder that holds Python files, and where each is."""
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^packages = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert block
    listed = re.findall(r'"([\w.]+)"', block[1])
    folders = {source.module for source in SOURCES if source.name.endswith("__init__.py")}
    with_files = {Path(source.name).parent.as_posix().replace("/", ".") for source in SOURCES}
    assert sorted(listed) == sorted(folders)
    assert {f"angelforge.{name}" if name.split(".")[0] != "angelforge" else name for name in with_files} == folders
    mapping = dict(re.findall(r'^"([\w.]+)" = "([\w/]+)"', text, re.MULTILINE))
    assert {name: mapping[name] for name in ("angelforge", *(f"angelforge.{folder}" for folder in FOLDERS[1:]))} == {
        "angelforge": "angelforge",
        **{f"angelforge.{folder}": folder for folder in FOLDERS[1:]},
    }


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "angelforge"])
def test_folders_are_importable_in_the_package_only(tmp_path: Path, folder: str) -> None:
    """`angelforge.exporter` is importable anywhere, `exporter` alone nowhere."""
    code = f"import angelforge.{folder}\ntry:\n  import {folder}\nexcept ModuleNotFoundError:\n  print('alone: no')"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout == "alone: no\n", result.stderr


def test_no_package_at_the_root() -> None:
    assert not (ROOT / "__init__.py").exists()


def style_breaks(source: Source, documented: bool) -> list[str]:
    """Where a file breaks a limit of the house."""
    found = []
    if len(source.text.splitlines()) > MAX_LINES:
        found.append(f"{source.name}: more than {MAX_LINES} lines")
    if source.tree.body and not ast.get_docstring(source.tree):
        found.append(f"{source.name}: no module docstring")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if (node.end_lineno or node.lineno) - node.lineno >= MAX_FUNCTION_LINES:
                found.append(f"{source.name}:{node.lineno}: {node.name} has more than {MAX_FUNCTION_LINES} lines")
        elif isinstance(node, ast.ExceptHandler):
            if node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"):
                found.append(f"{source.name}:{node.lineno}: catches everything")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
            found.append(f"{source.name}:{node.lineno}: runs what it reads ({ast.unparse(node.func)})")
    for node in source.tree.body if documented else []:
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if public and not ast.get_docstring(node):
            found.append(f"{source.name}:{node.lineno}: public {node.name} has no docstring")
    imported = ((line, module.split(".")[0]) for line, module in imported_modules(source))
    found += [f"{source.name}:{line}: imports {name}" for line, name in imported if name in FORBIDDEN_IMPORTS]
    return found


def test_house_style() -> None:
    """Files and functions of readable length, documented; nothing that runs what it reads or hides what failed."""
    assert [line for source in SOURCES for line in style_breaks(source, documented=True)] == []
    assert [line for source in TESTS for line in style_breaks(source, documented=False)] == []


@pytest.mark.parametrize(
    ("text", "breaks"),
    [
        ('"""Doc."""\nX = 1\n', 0),
        ("X = 1\n", 1),
        ("", 0),
        ('"""Doc."""\ndef f():\n    pass\n', 1),
        ('"""Doc."""\ndef _f():\n    pass\n', 0),
        ('"""Doc."""\ntry:\n    pass\nexcept Exception:\n    pass\n', 1),
        ('"""Doc."""\ntry:\n    pass\nexcept:\n    pass\n', 1),
        ('"""Doc."""\nimport pickle\n', 1),
        ('"""Doc."""\nX = eval("1")\nY = torch.load("x")\n', 2),
        ('"""Doc."""\ndef _f():\n' + "    pass\n" * 60, 1),
        ('"""Doc."""\n' + "X = 1\n" * 400, 1),
    ],
)
def test_style_breaks_are_seen(text: str, breaks: int) -> None:
    """The test above sees each kind of break."""
    assert len(style_breaks(Source("a.py", "angelforge.a", text, ast.parse(text)), documented=True)) == breaks


def test_no_path_of_one_machine() -> None:
    """No source names a folder of the machine it was written on."""
    pattern = re.compile(r"(?<![\w/.:~])/(?:work|root|home)/[\w/.-]+")
    files = [*SOURCES, *TESTS]
    assert [source.name for source in files if pattern.search(source.text)] == []


def test_the_wheel_holds_every_module(tmp_path: Path) -> None:
    """What setuptools would install is every source file in its place, the types' marker, the tuning table, the toy."""
    code = "from setuptools import setup; setup()"
    arguments = ["-q", "egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(tmp_path / "lib")]
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()
    built = {file.relative_to(tmp_path / "lib").as_posix() for file in (tmp_path / "lib").rglob("*") if file.is_file()}
    sources = {source.name for source in SOURCES}
    expected = {name if name.startswith("angelforge/") else f"angelforge/{name}" for name in sources}
    toy = {f"angelforge/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "tools/toy/checkpoints").glob("*/*")}
    assert built == expected | toy | {"angelforge/py.typed", "angelforge/plugins/tuning.json"}
