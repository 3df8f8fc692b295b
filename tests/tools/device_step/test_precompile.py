"""What is compiled ahead is what a step launches, and Triton's cache gives it to the launch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import compiled_once

from angelforge.config import ModelConfig
from angelforge.exporter.synthetic_config import FULL_CONFIG
from angelforge.plugins.kernel import Gpu
from angelforge.precision import Precision
from angelforge.tools.device_step import precompile
from angelforge.tools.device_step.memory import Subject
from angelforge.tools.device_step.precompile import step_tiles
from angelforge.tools.device_step.sequences import Case

GPU = Gpu("sm_90", 132)
SUBJECT = Subject(ModelConfig.from_dict(FULL_CONFIG).with_layers(2), Precision.FP8, 1024)


def test_every_tile_of_a_step_is_there_once() -> None:
    """A dense layer and one with experts, at batch 1 and 32: as docs/measurements/decoding.md counts them."""
    tiles = step_tiles(SUBJECT, [Case(1, 1024), Case(1, 2), Case(32, 1024)], GPU)
    assert len(tiles) == 24
    names = [work.operator.name for work, _ in tiles]
    assert names.count("Fp8MoEGateUp") == 1  # one tile serves both
    assert names.count("Fp8Linear") == 6  # three sizes, two tiles


def test_processes_that_die_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(*_: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(precompile, "compile_tiles", dead)
    said: list[str] = []
    precompile.precompile(SUBJECT, [Case(1, 2)], GPU, said.append)
    assert "OSError: no more processes" in said[1]


def test_a_launch_finds_what_was_compiled(tmp_path: Path) -> None:
    """By Triton's own account of it: a launch on sm_90 adds nothing to its cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, compiled_once.__file__, "AddNormQuantize"],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (found.returncode, found.stdout.strip()) == (0, ""), found.stderr
