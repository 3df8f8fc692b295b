"""Proves without a GPU that a bundle builds for a target: parser, plugins, shapes and profiles, on TensorRT for RTX."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkstemp
from time import perf_counter
from typing import Any

from angelforge.bundle import Bundle
from angelforge.engines.limits import BuildOptions
from angelforge.engines.preparation import prepare_build
from angelforge.engines.profiles import Profile
from angelforge.engines.tensorrt_builder import EngineRequest, build_engine
from angelforge.engines.tensorrt_progress import Report
from angelforge.errors import AngelForgeError, UsageError
from angelforge.plugins.operator import DOMAIN
from angelforge.plugins.tensorrt.library import Library, load_library
from angelforge.precision import Precision
from angelforge.targets import Target

# The first architecture that computes in each precision.
_SINCE = {Precision.FP32: 75, Precision.BF16: 80, Precision.FP8: 89}


@dataclass(frozen=True)
class Preflight:
    """What a preflight found. The engine that it built is thrown away: it would run on another architecture."""

    target: str
    architecture: str  # of the target
    built_for: str  # architecture that stood in for it
    library: str
    own_library: bool  # whether engines of the target come from it
    weights: int  # network inputs that are weights
    plugins: int  # nodes that became plugins
    profiles: tuple[Profile, ...]
    engine_bytes: int  # of target and draft
    seconds: float
    problem: str | None  # why the model does not fit on the target, though it builds

    @property
    def verdict(self) -> str:
        """What this proves, and what not."""
        proven = (
            "The bundle parses, every plugin is found and all shapes and profiles are consistent, "
            f"in {self.library} for {self.built_for}."
        )
        if self.own_library:
            return f"{proven} Nothing was kept: angelforge build --target {self.target} makes the engine."
        return (
            f"{proven} This is not the engine of {self.target} ({self.architecture}), which TensorRT 11 makes only on "
            f"such a machine: angelforge build --target {self.target}."
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"verdict": self.verdict}


def preflight(bundle: Bundle, target: Target, options: BuildOptions, report: Report) -> Preflight:
    """Builds the engine for the architecture nearest to the target's that TensorRT for RTX knows. Writes nothing.

    A model that does not fit on the target is built all the same, and the report says so.

    Raises:
        AngelForgeError: the bundle cannot be built; the message names the layer.
        UsageError: options that contradict each other.
    """
    begin = perf_counter()
    if target.backend == "onnxruntime":
        raise UsageError(f"The target {target.name} is built on any machine; there is nothing to check beforehand.")
    library = load_library("tensorrt-rtx")
    architecture = nearest_architecture(library, target.architecture, bundle.manifest.precision)
    prepared = prepare_build(bundle, target, options, must_fit=False)
    nbytes = 0
    for graph in prepared.graphs:
        descriptor, log = mkstemp(prefix="angelforge-preflight-", suffix=".log")
        os.close(descriptor)
        request = EngineRequest(library, architecture, prepared.profiles)
        kept = False
        try:
            nbytes += len(build_engine(graph.model, request, Path(log), report))
        except AngelForgeError:
            kept = True  # the message names it
            raise
        finally:
            if not kept:
                os.unlink(log)
    return Preflight(
        target=target.name,
        architecture=target.architecture,
        built_for=architecture,
        library=library.title,
        own_library=target.backend == library.flavour,
        weights=sum(len(graph.weights) for graph in prepared.graphs),
        plugins=sum(node.domain == DOMAIN for graph in prepared.graphs for node in graph.model.graph),
        profiles=prepared.profiles,
        engine_bytes=nbytes,
        seconds=round(perf_counter() - begin, 3),
        problem=prepared.plan.problem,
    )


def nearest_architecture(library: Library, wanted: str, precision: Precision) -> str:
    """The newest architecture that TensorRT for RTX builds for, not newer than `wanted` and able of `precision`.

    Without one the oldest that is able.
    """
    known = (int(name[2:]) for name in library.api.ComputeCapability.__members__ if name.startswith("SM"))
    able = sorted(number for number in known if number >= _SINCE[precision])
    return f"sm_{max((n for n in able if n <= int(wanted[3:])), default=able[0])}"
