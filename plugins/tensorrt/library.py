"""Loads TensorRT, or TensorRT for RTX: one API under two names."""

import atexit
import ctypes
import importlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from angelforge.errors import AngelForgeError

Flavour = Literal["tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True)
class _Source:
    """How one flavour is installed."""

    title: str
    modules: tuple[str, ...]  # the first that can be imported is taken
    libraries: str  # the package of the shared libraries, where they come as a wheel
    remedy: str


_SOURCES: dict[Flavour, _Source] = {
    "tensorrt": _Source(
        "TensorRT",
        ("tensorrt", "tensorrt_bindings"),
        "tensorrt_libs",
        "install TensorRT 11 on a machine with an NVIDIA GPU (docs/first-run.md)",
    ),
    "tensorrt-rtx": _Source(
        "TensorRT for RTX",
        ("tensorrt_rtx", "tensorrt_rtx_bindings"),
        "tensorrt_rtx_libs",
        "pip install 'angelforge[rtx]'",
    ),
}


@dataclass(frozen=True)
class Library:
    """A loaded TensorRT: `api` is its Python module."""

    flavour: Flavour
    api: Any
    version: str

    @property
    def title(self) -> str:
        """Its name and version in messages."""
        return f"{_SOURCES[self.flavour].title} {self.version}"


@cache
def load_library(flavour: Flavour) -> Library:
    """Imports TensorRT once per process.

    Raises:
        AngelForgeError: it is not installed, or its shared libraries cannot be loaded; the message says what to do.
    """
    source = _SOURCES[flavour]
    installed = [name for name in source.modules if find_spec(name)]
    if not installed:
        raise AngelForgeError(f"{source.title} is not installed; {source.remedy}.")
    _load_shared_libraries(source.libraries)
    try:
        api = importlib.import_module(installed[0])
        return Library(flavour, api, str(api.__version__))
    except (ImportError, OSError, AttributeError) as error:
        raise AngelForgeError(
            f"{source.title} is installed but cannot be loaded ({error}); {source.remedy}."
        ) from error


def _load_shared_libraries(package: str) -> None:
    """Loads a wheel's libraries so that the ONNX parser finds TensorRT under its name without a version.

    At the first plugin node the parser opens `libtensorrt_rtx.so`, but the wheel holds `libtensorrt_rtx.so.1` only, and
    the parser aborts the process. It searches the folder that it was itself loaded from ($ORIGIN in its RPATH): so all
    libraries are loaded through links in a folder of this process, where the short names exist too. The links are
    needed until the first plugin node is parsed and go when the process ends.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return  # not a wheel: the system's libraries, which have both names
    libraries = sorted(Path(spec.origin).parent.glob("*.so*"))
    if not libraries:
        return
    links = TemporaryDirectory(prefix="angelforge-libraries-")
    atexit.register(links.cleanup)
    for library in libraries:
        for name in {library.name, library.name.partition(".so")[0] + ".so"}:
            with suppress(FileExistsError):  # two libraries that differ in their version only
                (Path(links.name) / name).symlink_to(library)
    for library in libraries:
        if "builder_resource" in library.name:  # gigabytes, of which TensorRT opens what it needs
            continue
        with suppress(OSError):  # the import that follows says what is wrong
            ctypes.CDLL(str(Path(links.name) / library.name))
