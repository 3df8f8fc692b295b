"""`quantization.json` of a bundle: what quantising its weights lost, by kind of tensor. For people and machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from angelforge.atomic import write_atomic
from angelforge.config import Quantization
from angelforge.config_json import read_json_object
from angelforge.diskerrors import explained
from angelforge.exporter.packer import PackedShard
from angelforge.exporter.quantization_errors import Errors

FILE = "quantization.json"

_DIGITS = 6  # significant; sums of other machines differ, if at all, behind them


def write_report(folder: Path, packed: Sequence[PackedShard]) -> bool:
    """Writes the report of a bundle's weight files; returns False where nothing was quantised, and removes an old one.

    The text depends on the weights alone: not on how often packing was interrupted, nor on the number of threads.
    """
    if not any(shard.errors for shard in packed):
        with explained("remove", folder / FILE):
            (folder / FILE).unlink(missing_ok=True)
        return False
    write_atomic(folder / FILE, json.dumps(_report(packed), indent=1, allow_nan=False) + "\n")
    return True


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a bundle that has one, as `write_report` wrote it."""
    return read_json_object(folder / FILE)


def _report(packed: Sequence[PackedShard]) -> dict[str, Any]:
    kinds: dict[str, Errors] = {}
    for shard in packed:
        for kind, errors in shard.errors.items():
            kinds[kind] = kinds.get(kind, Errors()) + errors
    quantization = Quantization()
    return {
        "format": quantization.fmt,
        "block": list(quantization.block),
        "scale": "max(largest of the block, 1e-4) / 448",
        "all": _entry(sum(kinds.values(), Errors())),
        "kinds": {kind: _entry(errors) for kind, errors in kinds.items()},
        "files": {
            shard.file: {kind: _entry(errors) for kind, errors in sorted(shard.errors.items())}
            for shard in packed
            if shard.errors
        },
    }


def _entry(errors: Errors) -> dict[str, Any]:
    return {
        "weights": errors.count,
        "relative_error": _rounded(errors.relative),  # ‖w - q·s‖ / ‖w‖
        "largest_error": _rounded(errors.largest),  # of |w - q·s| / s; the steps of e4m3 are 2^-9 to 32
        "clipped": errors.clipped,
        "zeros": errors.zeros,
        "worst_tensor": errors.worst_tensor,
        "worst_relative_error": _rounded(errors.worst_relative),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
