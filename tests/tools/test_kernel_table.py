"""The machine code of every kernel for sm_90a, compiled without a GPU, in a process without Triton's interpreter."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from angelforge.plugins.architectures import shared_limit
from angelforge.targets import TARGETS
from angelforge.tools.kernel_table import PARTS, markdown

pytest.importorskip("triton")

DOC = Path(__file__).resolve().parents[2] / "docs" / "kernels-sm90.md"
REGENERATE = "run python -m angelforge.tools.kernel_table --page docs/kernels-sm90.md"
STATIC_SHARED = 48 * 1024  # bytes that a block may use without asking for more: TensorRT may not ask
OTHERS = sorted({target.architecture for target in TARGETS.values() if target.sms is not None} - {"sm_90"})
DECODE_TOKENS = 256  # of the largest profile that steps of decoding and verification take
FP8_MATMULS = {"Fp8Linear", "Fp8GateUp", "Fp8MoEGateUp", "Fp8MoEDown"}
QUANTISERS = {"NormQuantize", "AddNormQuantize", "Fp8GateUp", "Fp8MoEGateUp", "AttentionMergeQuantize"}
BF16_MATMULS = {"Linear", "GateUp", "MoEGateUp", "MoEDown"}
BF16_ONLY = {"Norm", "AttentionMerge", "GateUp", "MoEGateUp", "MoEDown"}  # the rest stands in the graph of fp8, too


@cache
def rows(part: str, *options: str, packages: Path | None = None) -> dict[str, Any]:
    """The table of a precision, or of sampling; with `packages`, by the Triton in that folder."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if packages is not None:
        environment["PYTHONPATH"] = str(packages)
    command = [sys.executable, "-m", "angelforge.tools.kernel_table", "--json", part, *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def resident(row: dict[str, Any]) -> int:
    """Blocks that an SM of sm_90 holds at once: 65,536 registers, given out by 8; 228 KB, one of them each block's."""
    registers = -(-row["registers"] // 8) * 8 * 32 * row["tile"]["warps"]
    return int(min(65536 // registers, 228 * 1024 // (row["shared"] + 1024)))


def breaks(row: dict[str, Any]) -> list[str]:
    """What a row must not be."""
    counts, name = row["counts"], f"{row['operator']} {row['tile']}"
    wrong = {
        "spills": row["spills"] > 0,
        "has scratch buffers, which TensorRT does not give": row["scratch"] > 0,
        "has a decode tile of more than 48 KB": min(row["profiles"]) <= DECODE_TOKENS and row["shared"] > STATIC_SHARED,
        "has more blocks an SM than it holds": resident(row) < row["tile"]["blocks_per_sm"],
        "multiplies in TF32": counts["mma.sync tf32"] > 0,
        "widens FP8 to f16": counts["fp8 to f16"] > 0,
    }
    if row["operator"] in FP8_MATMULS:
        wrong["has no FP8 tensor-core instruction"] = counts["wgmma e4m3"] == 0
        wrong["multiplies in f16 or bf16"] = counts["mma.sync f16"] + counts["mma.sync bf16"] + counts["wgmma bf16"] > 0
    if row["operator"] in BF16_MATMULS:
        wrong["has no bf16 wgmma"] = counts["wgmma bf16"] == 0
    if row["operator"] in FP8_MATMULS | BF16_MATMULS:
        wrong["has no 16-byte loads"] = counts["16-byte loads"] == 0
        wrong["copies weights by 4 bytes"] = counts["4-byte copies"] > 0
        # 16 rows of 64 bytes of x are 8 for each thread: one such copy a stage, and none of weights.
        wrong["copies weights by 8 bytes"] = counts["8-byte copies"] > row["tile"]["stages"]
    if row["operator"] in QUANTISERS:
        wrong["divides inexactly before it quantises"] = counts["ieee divisions"] == 0
        wrong["has no saturating cast to FP8"] = counts["f32 to fp8"] == 0
    return [f"{name} {what}" for what, is_so in wrong.items() if is_so]


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_machine_code_of_every_tile(precision: str) -> None:
    """FP8 and bf16 matmuls run on Hopper's tensor cores as such, nothing spills, decode tiles fit in 48 KB.

    And docs/kernels-sm90.md says so, line by line.
    """
    only = [] if precision == "fp8" else [f"--operator={name}" for name in BF16_ONLY]
    table = rows(precision, "--one-size", *only)
    found = table["parts"][precision]
    assert [what for row in found for what in breaks(row)] == []
    assert recorded(table) == [], REGENERATE
    assert (FP8_MATMULS if precision == "fp8" else BF16_ONLY) <= {row["operator"] for row in found}


def test_machine_code_that_chooses_tokens() -> None:
    """It spills nothing, fits in 48 KB and reads rows by 16 bytes; and docs/kernels-sm90.md says so."""
    table = rows("sampling")
    found = table["parts"]["sampling"]
    assert [what for row in found for what in breaks(row)] == []
    assert all(row["counts"]["16-byte loads"] > 0 for row in found if row["operator"] == "group_rows")
    assert recorded(table) == [], REGENERATE


def test_breaks_are_seen() -> None:
    """The test above sees each kind of break."""
    counts = dict.fromkeys(
        ["mma.sync tf32", "fp8 to f16", "mma.sync f16", "mma.sync bf16", "wgmma bf16", "4-byte copies"], 0
    )
    good = {
        "operator": "Fp8Linear",
        "tile": {"stages": 4, "warps": 4, "blocks_per_sm": 4},
        "registers": 128,
        "spills": 0,
        "scratch": 0,
        "profiles": [8],
        "shared": STATIC_SHARED,
    }
    good["counts"] = {
        **counts,
        "wgmma e4m3": 4,
        "16-byte loads": 9,
        "ieee divisions": 1,
        "f32 to fp8": 1,
        "8-byte copies": 4,
    }
    assert breaks(good) == []
    for key, value in {"registers": 129, "spills": 1, "scratch": 8, "shared": STATIC_SHARED + 1}.items():
        assert len(breaks({**good, key: value})) == 1
    for key, value in {**dict.fromkeys(counts, 1), "wgmma e4m3": 0, "16-byte loads": 0, "8-byte copies": 5}.items():
        assert len(breaks({**good, "counts": {**good["counts"], key: value}})) == 1
    for key in ("ieee divisions", "f32 to fp8"):
        counts = {**good["counts"], key: 0}
        assert len(breaks({**good, "operator": "NormQuantize", "counts": counts})) == 1


def recorded(found: dict[str, Any]) -> list[str]:
    """Lines of the table that the page does not have; none where the page was made with another Triton."""
    text = DOC.read_text(encoding="utf-8")
    if found["compiler"] not in text:
        return []
    return [line for line in markdown(found).splitlines() if line not in text.splitlines()]


def cannot_start(table: dict[str, Any]) -> list[str]:
    """Tiles that need more shared memory than the table's GPU gives a block, or scratch buffers."""
    limit = shared_limit(table["architecture"])
    return [
        f"{row['operator']} {row['tile']}: {row['shared']} bytes"
        for found in table["parts"].values()
        for row in found
        if row["shared"] > limit or row["scratch"] > 0
    ]


def test_the_largest_tile_starts_on_targets_of_small_blocks() -> None:
    """MoELogits' tile for prompts takes 128 KB on Hopper; other targets give a block 99."""
    assert "sm_89" in OTHERS
    table = rows("fp8", "--operator=MoELogits", "--architecture=sm_89")
    [prompts] = [row for row in table["parts"]["fp8"] if max(row["profiles"]) > DECODE_TOKENS]
    assert prompts["tile"]["n"] == 16
    assert (cannot_start(table), prompts["spills"]) == ([], 0)
    assert len(cannot_start({**table, "architecture": "sm_75"})) == 1


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
@pytest.mark.parametrize("architecture", OTHERS)
def test_every_tile_starts_on_every_target(architecture: str, precision: str) -> None:
    """Shared memory of all profiles' tiles. Without wgmma some spill a few values; logits and attention spill none."""
    only = [] if precision == "fp8" else [f"--operator={name}" for name in sorted(BF16_ONLY)]
    table = rows(precision, f"--architecture={architecture}", *only)
    assert cannot_start(table) == []
    for row in table["parts"][precision]:
        few = 2 if min(row["profiles"]) <= DECODE_TOKENS else 27  # as found by Triton 3.8
        assert row["spills"] <= (0 if row["operator"] in ("MoELogits", "PagedAttention") else few), row


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_the_page_shows_what_is_compiled(precision: str) -> None:
    """docs/kernels-sm90.md stands for this code and all of the model's sizes, where the same Triton is installed."""
    found = rows(precision)
    assert [what for row in found["parts"][precision] for what in breaks(row)] == []
    assert recorded(found) == [], REGENERATE


@pytest.mark.full
def test_an_older_triton_keeps_the_rules(tmp_path: Path) -> None:
    """Every tile compiled by Triton 3.6, which machines with a GPU may have (docs/kernels-sm90.md)."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={tmp_path}", "triton==3.6.0"]
    result = subprocess.run(install, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip(f"Triton 3.6.0 cannot be installed here: {result.stderr.strip()[-200:]}")
    for part in PARTS:
        found = rows(part, packages=tmp_path)
        assert found["compiler"] == "Triton 3.6.0"
        assert [what for row in found["parts"][part] for what in breaks(row)] == []
