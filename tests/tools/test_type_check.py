"""The type check sees the package as it is installed, and names the files of the checkout."""

from pathlib import Path

from angelforge.tools import type_check


def test_links_have_the_layout_of_the_package(tmp_path: Path) -> None:
    """Core modules and all folders lie in one package, as links to the sources."""
    source = Path(type_check.__file__).resolve().parents[1]
    type_check.link_package(source, tmp_path)
    package = tmp_path / "angelforge"
    assert (package / "errors.py").resolve() == source / "angelforge" / "errors.py"
    for folder in type_check.FOLDERS:
        assert (package / folder).resolve() == source / folder


def test_names_in_the_report() -> None:
    """Names of files are those of the checkout; the text of the messages is left alone."""
    report = 'angelforge/exporter/a.py:1: error: see angelforge/exporter/a.py\nangelforge/errors.py:2: error: "x"\n'
    expected = 'exporter/a.py:1: error: see angelforge/exporter/a.py\nangelforge/errors.py:2: error: "x"\n'
    assert type_check.source_names(report) == expected
