"""The tuning table: which row serves, what happens without one, and that nothing unknown is read."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from angelforge.errors import AngelForgeError
from angelforge.plugins.kernel import Gpu, Tile
from angelforge.plugins.tuning import (
    PACKAGED,
    PROFILES,
    WARPS,
    Row,
    packaged_rows,
    profile_of,
    read_rows,
    tile_for,
    tile_step,
    write_rows,
)

H20, H200 = Gpu("sm_90", 78), Gpu("sm_90", 132)
DIMS = {"T": "tokens", "K": 4096, "N": 5120}
TUNED, WIDE = Tile(16, 64, 128, 4, 5), Tile(16, 128, 128, 8, 3)
ENTRY: dict[str, Any] = {
    "operator": "Fp8Linear",
    "gpu_name": "NVIDIA H20",
    "architecture": "sm_90",
    "sms": 78,
    "profile": "8",
    "sizes": {"K": 4096},
    "tile": {"m": 16, "n": 64, "k": 128, "warps": 4, "stages": 5, "blocks_per_sm": 1},
    "microseconds": 6.5,
}


def kernel(name: str = "Fp8Linear") -> Any:
    """All that the table asks of a kernel: its name and its own rule."""
    return SimpleNamespace(operator=SimpleNamespace(name=name), tile_on=lambda gpu, dims, tokens: Tile(1, tokens))


def row(**changes: Any) -> Row:
    values: dict[str, Any] = {**ENTRY, "sizes": (("K", 4096),), "tile": TUNED, **changes}
    return Row(**values)


def written(tmp_path: Path, *entries: Any, **changes: Any) -> Path:
    file = tmp_path / "tuning.json"
    file.write_text(json.dumps({"format": 1, "note": "", "rows": list(entries), **changes}))
    return file


def test_the_row_of_gpu_profile_and_sizes_serves() -> None:
    table = (row(), row(profile="prefill", tile=WIDE))
    assert tile_for(kernel(), DIMS, H20, 1, table) == TUNED
    assert tile_for(kernel(), DIMS, H20, 8192, table) == WIDE


@pytest.mark.parametrize(
    ("name", "dims", "gpu", "tokens"),
    [
        ("Linear", DIMS, H20, 8),
        ("Fp8Linear", {**DIMS, "K": 9216}, H20, 8),
        ("Fp8Linear", {"T": 1}, H20, 8),
        ("Fp8Linear", DIMS, H200, 8),
        ("Fp8Linear", DIMS, Gpu("sm_100", 78), 8),
        ("Fp8Linear", DIMS, H20, 9),
    ],
)
def test_without_a_row_the_kernels_rule_decides(name: str, dims: dict[str, Any], gpu: Gpu, tokens: int) -> None:
    """Another operator, size, GPU or profile than the table's; the rule gets the tokens as they are."""
    assert tile_for(kernel(name), dims, gpu, tokens, (row(),)) == Tile(1, tokens)


def test_the_row_that_names_more_sizes_serves() -> None:
    table = (row(sizes=()), row(sizes=(("K", 4096), ("N", 5120)), tile=WIDE), row())
    assert tile_for(kernel(), DIMS, H20, 8, table) == WIDE


def test_the_packaged_table_is_empty_and_says_so() -> None:
    """Nothing has been measured yet; whoever fills the table changes this test."""
    assert packaged_rows() == ()
    assert "Nothing has been measured yet" in json.loads(PACKAGED.read_text())["note"]


@given(st.integers(1, 20000))
def test_profiles_follow_tokens(tokens: int) -> None:
    """The smallest profile that takes the tokens; prefill's tile step is the tokens themselves."""
    most = {"8": 8, "64": 64, "256": 256}.get(profile_of(tokens), 20000)
    assert tokens <= most
    assert tile_step(tokens) == (most if most < 20000 else tokens)


sizes = st.dictionaries(st.sampled_from(["K", "N", "H"]), st.integers(1, 9999)).map(lambda d: tuple(sorted(d.items())))
powers = st.sampled_from([1, 2, 16, 64, 128, 256])
rows = st.builds(
    Row,
    operator=st.sampled_from(["Linear", "Fp8Linear"]),
    gpu_name=st.just("NVIDIA H20"),
    architecture=st.just("sm_90"),
    sms=st.integers(1, 200),
    profile=st.sampled_from(PROFILES),
    sizes=sizes,
    tile=st.builds(Tile, powers, powers, powers, st.sampled_from(WARPS), st.integers(1, 8), st.integers(1, 8)),
    microseconds=st.floats(0, 1e6),
)


@given(st.lists(rows, unique_by=Row.key, max_size=5))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, table: list[Row]) -> None:
    file = tmp_path_factory.mktemp("table") / "tuning.json"
    write_rows(file, table, "a note")
    assert set(read_rows(file)) == set(table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile": "16"}, r"row 0: profile is '16', expected one of 8, 64, 256, prefill"),
        ({"sms": True}, "sms is True, expected a positive integer"),
        ({"sizes": {"K": 0}}, "K is 0"),
        ({"sizes": []}, "sizes is"),
        ({"operator": ""}, "operator is ''"),
        ({"microseconds": float("nan")}, "microseconds is nan"),
        ({"tile": {**ENTRY["tile"], "m": 48}}, "tile m is 48, expected a power of two"),
        ({"tile": {**ENTRY["tile"], "warps": 32}}, "tile warps is 32"),
        ({"tile": {"m": 16}}, "tile is {'m': 16}"),
        ({"extra": 1}, "expected an object of architecture, gpu_name"),
    ],
)
def test_a_wrong_row_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """The message names the file, the row and what was expected."""
    with pytest.raises(AngelForgeError, match=message):
        read_rows(written(tmp_path, {**ENTRY, **change}))


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    """No JSON, another format, other keys, a row twice, no file."""
    with pytest.raises(AngelForgeError, match="repeats an earlier row of Fp8Linear, profile 8"):
        read_rows(written(tmp_path, ENTRY, {**ENTRY, "microseconds": 1}))
    with pytest.raises(AngelForgeError, match="has format 2, this version reads 1"):
        read_rows(written(tmp_path, format=2))
    with pytest.raises(AngelForgeError, match="not a JSON object of format, note and a list of rows"):
        read_rows(written(tmp_path, more=1))
    (tmp_path / "tuning.json").write_text("{")
    with pytest.raises(AngelForgeError, match="cannot be read"):
        read_rows(tmp_path / "tuning.json")
    with pytest.raises(AngelForgeError, match="cannot be read"):
        read_rows(tmp_path / "none.json")
