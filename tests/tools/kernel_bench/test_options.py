"""What `bench kernels` refuses before it looks for a GPU."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from angelforge.plugins.tensorrt import gpu as gpus
from angelforge.tools.cli import main


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--seconds", "-1"], "--seconds is -1, but a time above 0"),
        (["--seconds", "0"], "--seconds is 0"),
        (["--seconds", "nan"], "nan"),
        (["--seed", "-5"], "--seed is -5"),
        (["--seed", str(2**63)], "--seed is"),
        (["--json", "absent/x.json"], "--json names a file in absent, which is no folder"),
        (["--json", "."], "--json is ., which is a folder"),
        (["--tune", "--tuning", "absent/x.json"], "--tuning names a file in absent"),
    ],
)
def test_options_of_no_use_are_refused_first(
    options: list[str], told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Exit code 2, whether or not there is a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpus, "find_gpu", lambda index=0: None)
    result = CliRunner().invoke(main, ["bench", "kernels", *options])
    assert (result.exit_code, told in result.output, "Traceback" in result.output) == (2, True, False), result.output
