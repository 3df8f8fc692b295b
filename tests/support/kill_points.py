"""A program: packs a checkpoint and is killed at every point where the disk changes, each time into a fresh bundle.

usage: kill_points.py CHECKPOINT PRECISION FOLDER   makes FOLDER/0, FOLDER/1, … and prints how many points there were.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from angelforge.checkpoint import Checkpoint
from angelforge.exporter.layout import bundle_tensors, plan_shards
from angelforge.exporter.packer import pack
from angelforge.precision import Precision

CALLS = ("open", "pwrite", "ftruncate", "fsync", "replace", "unlink")


def main(source: str, precision: str, folder: str) -> None:
    """Kills at the first, second, … call until a packing ends by itself."""
    checkpoint = Checkpoint.open(source)
    shards = plan_shards(bundle_tensors(checkpoint.config, Precision(precision), 128))
    point = 0
    while True:
        child = os.fork()  # this program has no other threads
        if child == 0:
            _kill_at(point)
            pack(checkpoint, shards, Path(folder, str(point)), workers=1)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            print(point)
            return
        point += 1


def _kill_at(point: int) -> None:
    left = [point]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*args, **options)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


if __name__ == "__main__":
    main(*sys.argv[1:4])
