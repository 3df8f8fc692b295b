"""The runners as Polygraphy's command line finds them; docs/validation.md runs that command line."""

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tomllib
from polygraphy.exception import PolygraphyException
from support.built import make_bundle
from support.faults import break_engine, swapped_gate_and_up
from support.sources import ROOT

from angelforge.exporter.export import ExportOptions, export
from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.precision import Precision
from angelforge.runtime.validate.data import feed_dicts
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


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "judge: ONNX Runtime on the graph vs. engine: cpu | Passed: 0/1 iterations"),
        pytest.param(("--angelforge-target", "h21"), "There is no target 'h21'", marks=pytest.mark.full),
        pytest.param(
            ("--angelforge-reference", "--angelforge-callable", "nowhere:f"), "nowhere", marks=pytest.mark.full
        ),
    ],
)
def test_what_is_wrong_fails_on_polygraphys_command_line(tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    """Through the entry points, an engine with gate and up swapped among them: not code 0, and a sentence."""
    sizes = {"num_hidden_layers": 3, "vocab_size": 320}
    _, bundle = make_bundle(tmp_path, sizes, ExportOptions(precision=Precision.FP32))
    (tmp_path / "data.py").write_text(
        "from angelforge.runtime.validate.data import feed_dicts\nload_data = lambda: feed_dicts('bundle', 1, 8)\n"
    )
    break_engine(bundle, swapped_gate_and_up)
    command = [str(Path(sys.executable).with_name("polygraphy")), "run", "bundle/model.onnx", "--atol", "1e-4"]
    command += ["--data-loader-script", "data.py", "--angelforge-judge", "--angelforge-engine", *more]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert said in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_errors_of_runners_are_polygraphys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a runner is opened, and while it runs: no engine was built, the reference raises."""
    (tmp_path / "broken_model.py").write_text("def logits(ids):\n    raise ValueError('mine')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_config(num_hidden_layers=2, vocab_size=320))
    bundle = export(str(checkpoint), tmp_path / "bundle", ExportOptions(precision=Precision.FP32))
    graph = str(bundle.folder / "model.onnx")
    (feed,) = feed_dicts(str(bundle.folder), 1)
    engine = make_runner("engine", graph)
    with pytest.raises(PolygraphyException, match="build"), engine:
        engine.infer(feed)
    reference = make_runner("reference", graph, "broken_model:logits")
    with pytest.raises(PolygraphyException, match="raised ValueError: mine"), reference:
        reference.infer(feed)
