"""What another engine's kernel is to this bench: a call on the same inputs, and its results as an operator's outputs.

None of these packages is a dependency: an engine is looked for when a run starts, and one that is not there, does not
load or raises becomes a line of the report.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from angelforge.tools.kernel_bench.failures import LAUNCH_ERRORS
from angelforge.tools.kernel_bench.work import Work

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Rival:
    """One kernel (or the few that do the work of ours), bound to inputs."""

    name: str
    call: Callable[[], None]  # enqueues on torch's current stream; outputs stay the same tensors
    outputs: Callable[[], Sequence[torch.Tensor | None]]  # after a call, in the operator's order; None: it has no such
    note: str = ""  # what it does more or less than the operator


@dataclass(frozen=True)
class Shared:
    """Tensors that several calls take, such as gate and up in one: made once for the weights of a run."""

    tensors: dict[tuple[str, int], torch.Tensor]

    def get(self, name: str, source: torch.Tensor | None, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` gives for `source`, or for no tensor in particular; made at the first call."""
        key = name, 0 if source is None else source.data_ptr()
        if key not in self.tensors:
            self.tensors[key] = make()
        return self.tensors[key]


# Binds a kernel of an engine's package to a call's inputs.
Prepare = Callable[[Any, Work, Tensors, Shared], Rival]


@dataclass(frozen=True)
class Engine:
    """A package whose kernels stand beside ours."""

    name: str
    packages: tuple[str, ...]  # import names, the first that is installed counts
    kernels: Mapping[str, tuple[Prepare, ...]]  # by operator

    def installed(self) -> str | None:
        """The import name that is there; nothing is imported but a package's parents."""
        for package in self.packages:
            try:
                if find_spec(package) is not None:
                    return package
            except LAUNCH_ERRORS:  # a parent that does not load
                continue
        return None

    def load(self) -> Any:
        """The installed package.

        Raises:
            LAUNCH_ERRORS: it does not load.
        """
        found = self.installed()
        if found is None:
            raise ImportError(f"{self.packages[0]} is not installed")
        return import_module(found)
