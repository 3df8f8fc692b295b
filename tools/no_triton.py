"""Triton's launches where there is no GPU: compiled for Hopper, loaded nowhere, ended before the driver is asked."""

from __future__ import annotations

from types import SimpleNamespace

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

_SHARED = 232_448  # bytes that a block of Hopper may have


class Launcher:
    """What a compiled kernel calls with its grid and arguments."""

    def __init__(self, source: object, metadata: object) -> None:
        """Of any kernel."""

    def __call__(self, *arguments: object) -> None:
        """Launches nothing."""


class _Driver:
    """What Triton asks of a GPU's driver in order to compile and to launch."""

    launcher_cls = Launcher
    utils = SimpleNamespace(
        load_binary=lambda name, kernel, shared, device: (None, 1, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": _SHARED},
        unload_module=lambda module: None,
    )

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """A Hopper GPU."""
        return GPUTarget("cuda", 90, 32)


def launch_nothing() -> None:
    """From now on Triton believes to have such a GPU. For a process that has none."""
    driver.set_active(_Driver())
