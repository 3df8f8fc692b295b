"""What replicas are made of."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from angelforge.errors import UsageError
from angelforge.runtime.depth import Depth
from angelforge.runtime.server.options import ServerOptions
from angelforge.targets import get_target


@dataclass(frozen=True)
class ReplicaOptions:
    """A bundle's engine and the server around it, so many times. Raises UsageError if a value makes no sense."""

    bundle: Path  # at the same place on every machine
    target: str
    count: int
    server: ServerOptions
    kv_memory: int | None = None  # bytes of each replica's cache
    max_batch: int = 32
    threads: int | None = None  # of each replica on a CPU
    speculate: Depth = "auto"
    cluster: str | None = None  # address of a running Ray; None: one of its own on this machine

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"--replicas is {self.count}, but at least 1 is needed.")
        if self.server.port == 0:
            raise UsageError("Replicas need a port of your choice: give --port a number above 0.")

    @property
    def gpus(self) -> int:
        """GPUs that each replica gets to itself."""
        return int(get_target(self.target).device != "cpu")

    @property
    def threads_each(self) -> int | None:
        """Threads of a replica: as asked for, else this machine's cores shared out, where they share one."""
        if self.threads is not None or self.gpus or self.cluster is not None:
            return self.threads
        return max(1, len(os.sched_getaffinity(0)) // self.count)
