"""The runners as Polygraphy's command line finds them; docs/validation.md runs that command line."""

from importlib.metadata import entry_points
from pathlib import Path

import pytest
from polygraphy.exception import PolygraphyException

from angelforge.runtime.validate.polygraphy_plugin import arg_groups, make_runner


def test_the_entry_point_gives_all_runners() -> None:
    """By the name that pyproject.toml gives it."""
    (found,) = entry_points(group="polygraphy.run.plugins", name="angelforge")
    groups = found.load()()
    assert [type(group) for group in groups] == [type(group) for group in arg_groups()]
    options = [group.get_name_opt()[1] for group in groups]
    assert options == ["angelforge-judge", "angelforge-engine", "angelforge-kernels", "angelforge-reference"]


def test_errors_are_polygraphys(tmp_path: Path) -> None:
    """A sentence, and none of our tracebacks."""
    with pytest.raises(PolygraphyException, match="There is no bundle"):
        make_runner("judge", str(tmp_path / "model.onnx"))
