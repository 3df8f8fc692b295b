"""The runners as Polygraphy's command line finds them; docs/validation.md runs that command line."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tomllib
from polygraphy.exception import PolygraphyException
from support.sources import ROOT

from angelforge.runtime.validate.polygraphy_plugin import arg_groups, make_runner


def test_the_entry_point_gives_all_runners() -> None:
    """By the name that pyproject.toml gives it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    group = "polygraphy.run.plugins"
    found = EntryPoint("angelforge", project["entry-points"][group]["angelforge"], group)
    groups = found.load()()
    assert [type(group) for group in groups] == [type(group) for group in arg_groups()]
    options = [group.get_name_opt()[1] for group in groups]
    assert options == ["angelforge-judge", "angelforge-engine", "angelforge-kernels", "angelforge-reference"]


def test_errors_are_polygraphys(tmp_path: Path) -> None:
    """A sentence, and none of our tracebacks."""
    with pytest.raises(PolygraphyException, match=r"no angelforge\.json"):
        make_runner("judge", str(tmp_path / "model.onnx"))
