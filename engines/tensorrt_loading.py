"""Compares all that is known of a TensorRT engine with bundle, library and machine, before TensorRT sees it."""

from dataclasses import dataclass
from hashlib import sha256

from angelforge.bundle import Bundle
from angelforge.diskerrors import explained
from angelforge.engines.build import kernel_digests
from angelforge.engines.manifest import MANIFESTS, EngineManifest, engine_folder
from angelforge.engines.profiles import Profile
from angelforge.errors import AngelForgeError
from angelforge.plugins.registry import OPERATORS
from angelforge.plugins.tensorrt.gpu import GpuFacts
from angelforge.plugins.tensorrt.library import Library
from angelforge.targets import Target


@dataclass(frozen=True)
class TensorrtEngine:
    """An engine that may be given to TensorRT."""

    manifest: EngineManifest
    profiles: tuple[Profile, ...]
    plan: bytes  # the serialized engine


def open_tensorrt_engine(
    bundle: Bundle, target: Target, library: Library, gpu: GpuFacts, tensor_parallel: int = 1, role: str = "target"
) -> TensorrtEngine:
    """The engine of `target` (or of its draft, by `role`), after every fact that can differ has been compared.

    Raises:
        AngelForgeError: no engine, a damaged one, or one for something else; one sentence says what is found and what
            is needed, another what to do.
    """
    folder = engine_folder(bundle, target.name, tensor_parallel)
    manifest = EngineManifest.load(folder, MANIFESTS[role])
    file = folder / manifest.engine
    with explained("read", file):
        plan = file.read_bytes()
    manifest.require({"engine_bytes": len(plan)})
    manifest.require({"engine_digest": sha256(plan).hexdigest()})
    manifest.require({"operators": _own_versions(manifest)})
    manifest.require_bundle(bundle, role, tensor_parallel)
    manifest.require({"kernels": kernel_digests(bundle)})
    manifest.require({"backend": library.flavour, "backend_version": library.version})
    require_gpu_of(manifest, gpu)
    profiles = _profiles(manifest)
    return TensorrtEngine(manifest, profiles, plan)


def require_gpu_of(manifest: EngineManifest, gpu: GpuFacts) -> None:
    """Compares the engine with the GPU that is to run it.

    Raises:
        AngelForgeError: another architecture, another GPU where the engine runs on one kind only, an older driver.
    """
    manifest.require({"architecture": gpu.architecture})
    if manifest.gpu is not None:
        manifest.require({"gpu": gpu.name})
    if manifest.driver is not None and _version(gpu.driver) < _version(manifest.driver):
        manifest.require({"driver": gpu.driver})


def _own_versions(manifest: EngineManifest) -> dict[str, int]:
    """The versions that this program has of the engine's operators."""
    return {name: OPERATORS[name].version for name in manifest.operators if name in OPERATORS}


def _profiles(manifest: EngineManifest) -> tuple[Profile, ...]:
    try:
        return tuple(Profile.from_dict(profile) for profile in manifest.profiles)
    except (KeyError, TypeError) as error:
        raise AngelForgeError(
            f"The manifest of the engine for {manifest.target} has a profile that cannot be read ({error}). "
            f"Build it again: angelforge build --target {manifest.target}."
        ) from error


def _version(text: str) -> tuple[int, ...]:
    """`580.65.06` as numbers; of an unknown version nothing."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())
