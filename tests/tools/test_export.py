"""`angelforge export --precision fp8` prints what quantising lost, for people and for machines."""

import json
from pathlib import Path

from click.testing import CliRunner, Result

from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.tools.cli import main


def export(*args: object) -> Result:
    result = CliRunner().invoke(main, ["export", *map(str, args)])
    assert result.exit_code == 0, result.output
    return result


def test_quantised_weights_are_accounted_for(tmp_path: Path) -> None:
    """A row for each kind and one for all; the same figures with --json and in the bundle."""
    checkpoint = write_checkpoint(tmp_path / "c", small_config(num_hidden_layers=2))
    shown = export(checkpoint, tmp_path / "b", "--precision", "fp8").stdout
    rows = [line.split() for line in shown.splitlines() if " scales " in line]
    assert [row[0] for row in rows] == ["dense", "attention", "routed", "shared", "all"]
    facts = json.loads(export(checkpoint, tmp_path / "b", "--precision", "fp8", "--json").stdout)
    report = json.loads((tmp_path / "b/quantization.json").read_text())
    assert facts["quantization"] == {"all": report["all"], "kinds": report["kinds"]}
    assert rows[-1][1:3] == [f"{report['all']['weights']:,}", f"{report['all']['relative_error']:.2%}"]


def test_nothing_is_said_where_nothing_was_quantised(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", small_config(num_hidden_layers=1), dtype="FP8")
    assert " scales " not in export(checkpoint, tmp_path / "b").stdout
    assert json.loads(export(checkpoint, tmp_path / "b", "--json").stdout)["quantization"] is None
