"""The tuning table: measured tiles by operator, GPU and profile; where it has no row, the kernel's own rule serves.

A row holds for one architecture and number of SMs (tiles follow from both), one profile, and the weight sizes that it
names. `angelforge bench kernels --tune` writes such a file.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from angelforge.errors import AngelForgeError
from angelforge.plugins.kernel import Gpu, Kernel, Tile

FORMAT = 1
PACKAGED = Path(__file__).with_name("tuning.json")
TILE_STEPS = (8, 64, 256)  # most tokens of the profiles with a tile of their own; engines/profiles.py has the same
PROFILES = (*map(str, TILE_STEPS), "prefill")
WARPS = (1, 2, 4, 8, 16)  # a block


@dataclass(frozen=True)
class Row:
    """One measured tile. `gpu_name` and `microseconds` tell readers where it is from; nothing depends on them."""

    operator: str
    gpu_name: str  # "NVIDIA H20"
    architecture: str  # "sm_90"
    sms: int
    profile: str  # one of PROFILES
    sizes: tuple[tuple[str, int], ...]  # the operator's symbols that weights fix, sorted; () for all
    tile: Tile
    microseconds: float

    def serves(self, operator: str, dims: Mapping[str, Any], gpu: Gpu, profile: str) -> bool:
        """Whether the row is for this operator, GPU, profile and these sizes."""
        here = (self.operator, self.architecture, self.sms, self.profile)
        return here == (operator, gpu.architecture, gpu.sms, profile) and all(
            isinstance(dims.get(symbol), int) and dims[symbol] == size for symbol, size in self.sizes
        )

    def key(self) -> tuple[Any, ...]:
        """What no two rows of a table share."""
        return self.operator, self.architecture, self.sms, self.profile, self.sizes


def tile_step(tokens: int) -> int:
    """The smallest number of tokens at or above `tokens` for which kernels have a tile of their own."""
    return next((step for step in TILE_STEPS if tokens <= step), tokens)


def profile_of(tokens: int) -> str:
    """The name of the profile that takes `tokens` tokens: "8", "64", "256" or "prefill"."""
    step = tile_step(tokens)
    return str(step) if step in TILE_STEPS else "prefill"


def tile_for(
    kernel: Kernel, dims: Mapping[str, Any], gpu: Gpu, profile_tokens: int, table: tuple[Row, ...] | None = None
) -> Tile:
    """The tile for a profile of at most `profile_tokens` tokens: of the table (default: the packaged one), else of the
    kernel's rule. Of several rows the one that names the most sizes.

    Raises:
        AngelForgeError: the packaged table is damaged.
    """
    rows = packaged_rows() if table is None else table
    name, profile = kernel.operator.name, profile_of(profile_tokens)
    found = [row for row in rows if row.serves(name, dims, gpu, profile)]
    return max(found, key=lambda row: len(row.sizes)).tile if found else kernel.tile_on(gpu, dims, profile_tokens)


@cache
def packaged_rows() -> tuple[Row, ...]:
    """The rows of the table that the package carries."""
    return read_rows(PACKAGED)


def read_rows(path: Path) -> tuple[Row, ...]:
    """The rows of a tuning file.

    Raises:
        AngelForgeError: it cannot be read, or holds anything that the format does not know; the message says where.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AngelForgeError(f"The tuning table {path} cannot be read: {error}.") from error
    if not isinstance(raw, dict) or raw.keys() != {"format", "note", "rows"} or not isinstance(raw["rows"], list):
        raise AngelForgeError(
            f"The tuning table {path} is not a JSON object of format, note and a list of rows; write it again with "
            "`angelforge bench kernels --tune`."
        )
    if raw["format"] != FORMAT:
        raise AngelForgeError(f"The tuning table {path} has format {raw['format']!r}, this version reads {FORMAT}.")
    rows: dict[tuple[Any, ...], Row] = {}
    for number, entry in enumerate(raw["rows"]):
        try:
            row = _row(entry)
            if rows.setdefault(row.key(), row) is not row:
                raise ValueError(f"repeats an earlier row of {row.operator}, profile {row.profile}")
        except ValueError as error:
            raise AngelForgeError(f"The tuning table {path} is wrong in row {number}: {error}.") from error
    return tuple(rows.values())


def write_rows(path: Path, rows: Iterable[Row], note: str) -> None:
    """Writes a tuning file, one row a line, sorted; `note` says where the rows are from."""
    from angelforge.atomic import write_atomic

    ordered = sorted(rows, key=lambda row: (row.operator, row.sms, row.sizes, PROFILES.index(row.profile)))
    lines = [json.dumps({**asdict(row), "sizes": dict(row.sizes)}) for row in ordered]
    body = "[\n    " + ",\n    ".join(lines) + "\n  ]" if lines else "[]"
    write_atomic(path, f'{{\n  "format": {FORMAT},\n  "note": {json.dumps(note)},\n  "rows": {body}\n}}\n')


def _row(entry: Any) -> Row:
    """A row of the file; raises ValueError saying what is wrong."""
    names = {field.name for field in fields(Row)}
    if not isinstance(entry, dict) or entry.keys() != names:
        raise ValueError(f"expected an object of {', '.join(sorted(names))}, found {str(entry)[:100]}")
    for name in ("operator", "gpu_name", "architecture"):
        if not isinstance(entry[name], str) or not entry[name]:
            raise ValueError(f"{name} is {entry[name]!r}, expected text")
    if entry["profile"] not in PROFILES:
        raise ValueError(f"profile is {entry['profile']!r}, expected one of {', '.join(PROFILES)}")
    if not isinstance(entry["sizes"], dict):
        raise ValueError(f"sizes is {entry['sizes']!r}, expected an object")
    time = entry["microseconds"]
    if isinstance(time, bool) or not isinstance(time, int | float) or not 0 <= time < float("inf"):
        raise ValueError(f"microseconds is {time!r}, expected a number")
    sizes = tuple(sorted((name, _positive(name, size)) for name, size in entry["sizes"].items()))
    sms, tile = _positive("sms", entry["sms"]), _tile(entry["tile"])
    return Row(**{**entry, "sms": sms, "sizes": sizes, "tile": tile, "microseconds": float(time)})


def _tile(entry: Any) -> Tile:
    names = {field.name for field in fields(Tile)}
    if not isinstance(entry, dict) or entry.keys() != names:
        raise ValueError(f"tile is {entry!r}, expected an object of {', '.join(sorted(names))}")
    tile = Tile(**{name: _positive(name, value) for name, value in entry.items()})
    for name, size in (("m", tile.m), ("n", tile.n), ("k", tile.k)):
        if size & (size - 1):
            raise ValueError(f"tile {name} is {size}, expected a power of two")
    if tile.warps not in WARPS:
        raise ValueError(f"tile warps is {tile.warps}, expected one of {', '.join(map(str, WARPS))}")
    return tile


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a positive integer")
    return value
