"""`manifest.json` beside every engine: what it was made from and for, compared before it is loaded."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from angelforge.bundle import Bundle
from angelforge.diskerrors import explained
from angelforge.errors import AngelForgeError, UsageError

FORMAT = 1
FILE = "manifest.json"
DRAFT_FILE = "draft.json"  # the manifest of the draft's engine
MANIFESTS = {"draft": DRAFT_FILE, "target": FILE}  # by role

# How a difference is told: what the engine has, what is needed.
_DIFFERENCES = {
    "backend": "is for {found}, but {needed} is to run it",
    "backend_version": "was built with version {found} of its library, but version {needed} is installed",
    "engine_digest": "is not the file that was built: its sha256 begins with {needed}, expected {found}",
    "engine_bytes": "has {needed} bytes, expected {found}: it was cut off or replaced",
    "model_digest": "was built for another model configuration ({found}) than the bundle's ({needed})",
    "graph_digest": "was built from another graph ({found}) than the bundle's ({needed})",
    "target_digest": "was built for another target ({found}) than the bundle's ({needed})",
    "draft_digest": "was built for another draft ({found}) than the bundle's ({needed})",
    "precision": "was built for precision {found}, but the bundle has {needed}",
    "max_context": "was built for contexts of {found} tokens, but the bundle has {needed}",
    "page_size": "was built for pages of {found} tokens, but the bundle has {needed}",
    "rope": "was built for the rotary embedding {found}, but the bundle has {needed}",
    "operators": "has the operators {found}, but this version has {needed}",
    "kernels": "has the kernels {found}, but this version has {needed}",
    "architecture": "is for the architecture {found}, but this machine's GPU is {needed}",
    "gpu": "was built on a {found}, but this machine has a {needed}",
    "driver": "was built with driver {found}, but this machine has the older {needed}",
    "tensor_parallel": "was built for {found} ranks, but {needed} are to run it",
}


# How it is told that one side has no draft at all: what the engine was built from, what the bundle is.
_WITHOUT_DRAFT = "was built without the draft ({needed}) that the bundle has"
_DRAFT_GONE = "was built with a draft ({found}), but the bundle has none"


@dataclass(frozen=True)
class EngineManifest:
    """Facts about one built engine; digests are sha256 in hex."""

    target: str  # name in the table of targets
    backend: str  # "onnxruntime", "tensorrt" or "tensorrt-rtx"
    backend_version: str
    engine: str  # file name beside the manifest
    engine_digest: str
    model_digest: str  # of the model configuration
    graph_digest: str  # of the bundle's graph
    precision: str
    max_context: int  # positions
    page_size: int  # tokens
    operators: Mapping[str, int]  # versions of the operators in the graph
    seconds: float  # the build took
    engine_bytes: int = 0
    built_at: str = ""  # UTC, ISO 8601
    architecture: str = "cpu"  # "sm_90": what the engine runs on
    gpu: str | None = None  # the GPU it was built on, where it runs on no other
    driver: str | None = None  # it was built with
    tensor_parallel: int = 1  # ranks
    rope: Mapping[str, float | int] = field(default_factory=dict)  # YaRN factor, attention factor, rotary width
    draft_digest: str | None = None  # of the bundle's draft graph
    target_digest: str | None = None  # of the bundle's target graph, in the manifest of a draft's engine
    kernels: Mapping[str, str] = field(default_factory=dict)  # digests by operator
    profiles: Sequence[Mapping[str, Any]] = ()  # `Profile.to_dict`
    activation_bytes: Sequence[int] = ()  # of each profile, as TensorRT tells
    options: Mapping[str, Any] = field(default_factory=dict)  # of the build
    format: int = FORMAT

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def load(cls, folder: Path, file: str = FILE) -> "EngineManifest":
        """Reads the manifest in `folder`.

        Raises:
            AngelForgeError: there is none, or it is not one of this format.
        """
        path = folder / file
        rebuild = f"Build the engine again: {_command(folder)}."
        try:
            raw: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise AngelForgeError(f"There is no engine in {folder} (no {file}). {rebuild}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise AngelForgeError(f"{path} cannot be read: {error}. {rebuild}") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
            raise AngelForgeError(f"{path} has format {found}, this version reads {FORMAT}. {rebuild}")
        wanted = {field.name for field in fields(cls)}
        if set(raw) != wanted:
            raise AngelForgeError(f"{path} has wrong keys: {sorted(set(raw) ^ wanted)}. {rebuild}")
        manifest = cls(**raw)
        if wrong := [name for name, value in asdict(manifest).items() if not _fits(name, value)]:
            raise AngelForgeError(f"{path} has a value of the wrong kind under {', '.join(wrong)}. {rebuild}")
        return manifest

    def require(self, expected: Mapping[str, object]) -> None:
        """Compares facts by name.

        Raises:
            AngelForgeError: for the first fact that differs: what the engine has, what is needed, the fix.
        """
        for name, needed in expected.items():
            found = getattr(self, name)
            if found == needed:
                continue
            if isinstance(found, Mapping) and isinstance(needed, Mapping):
                found, needed = _differing(found, needed), _differing(needed, found)
            sentence = _DIFFERENCES[name]
            if name == "draft_digest" and None in (found, needed):
                sentence = _WITHOUT_DRAFT if found is None else _DRAFT_GONE
            said = sentence.format(found=_shown(found), needed=_shown(needed))
            shared = f" --tensor-parallel {self.tensor_parallel}" if self.tensor_parallel > 1 else ""
            raise AngelForgeError(
                f"The engine for {self.target} {said}. Build it again: angelforge build --target {self.target}{shared}."
            )

    def require_bundle(self, bundle: Bundle, role: str, ranks: int = 1) -> None:
        """Compares the engine with the bundle's configuration and with the graphs that it was built from.

        What an engine was built from comes before the operators that follow from it: a draft brings its own.

        Raises:
            AngelForgeError: as `require` does.
        """
        facts = bundle_facts(bundle)
        operators = facts.pop("operators")
        self.require(facts | {"tensor_parallel": ranks})
        graphs = graph_facts(bundle, role, ranks)
        graph = graphs.pop("graph_digest")
        # Another version of an operator changes both graphs: that is told as what it is.
        self.require({"operators": {name: operators.get(name, version) for name, version in self.operators.items()}})
        self.require(graphs)
        self.require({"operators": operators, "graph_digest": graph})


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """What a bundle says that its engines must agree with, by the names of `EngineManifest`."""
    manifest = bundle.manifest
    return {
        "model_digest": manifest.model_digest,
        "precision": manifest.precision.value,
        "max_context": manifest.max_context,
        "page_size": manifest.page_size,
        "rope": manifest.rope,
        "operators": dict(manifest.operators),
    }


def graph_facts(bundle: Bundle, role: str, ranks: int = 1) -> dict[str, Any]:
    """Digests of the bundle's graphs as they stand on disk now, by the names of `EngineManifest`.

    The graph under `role`, and what ties the engines of a target and its draft together: each other's graph.
    """
    files = {each: graph_file(bundle, each, ranks) for each in bundle.manifest.graphs if each in ("target", "draft")}
    return {
        "graph_digest": file_digest(files[role]),
        "draft_digest": file_digest(files["draft"]) if "draft" in files else None,
        "target_digest": file_digest(files["target"]) if role == "draft" else None,
    }


def graph_file(bundle: Bundle, role: str, ranks: int = 1) -> Path:
    """The graph of a role for so many ranks. A draft has one graph for all: it runs on the first rank alone.

    Raises:
        UsageError: the bundle has none.
    """
    graphs = bundle.manifest.graphs
    key = role if ranks == 1 or role == "draft" else f"{role}-tp{ranks}"
    if key not in graphs:
        raise UsageError(
            f"The bundle {bundle.folder} has no graph for {ranks} ranks, only {', '.join(graphs)}. Building adds it: "
            f"angelforge build {bundle.folder} --tensor-parallel {ranks}."
        )
    return bundle.folder / graphs[key]


def engine_folder(bundle: Bundle, target: str, ranks: int = 1) -> Path:
    """Where the engine for `target` stands in a bundle; one for several ranks has a folder of its own."""
    return bundle.folder / "engines" / (target if ranks == 1 else f"{target}-tp{ranks}")


def _command(folder: Path) -> str:
    """That builds what stands in an engine's folder."""
    target, _, ranks = folder.name.partition("-tp")
    return f"angelforge build {folder.parents[1]} --target {target}" + (f" --tensor-parallel {ranks}" if ranks else "")


def remove_older_engines(folder: Path, current: Collection[str]) -> None:
    """Removes the engines in `folder` whose names are not in `current`."""
    for path in folder.iterdir():
        if path.suffix in (".engine", ".onnx", ".zip") and path.name not in current:
            with explained("remove", path):
                path.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """sha256 of a file that fits into memory, such as a graph or an engine.

    Raises:
        AngelForgeError: the file cannot be read.
    """
    with explained("read", path):
        return sha256(path.read_bytes()).hexdigest()


_INTEGERS = {"max_context", "page_size", "engine_bytes", "tensor_parallel", "format"}
_OBJECTS = {"operators", "rope", "kernels", "options"}
_OPTIONAL = {"gpu", "driver", "draft_digest", "target_digest"}


def _fits(name: str, value: object) -> bool:
    if name in _INTEGERS:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if name in _OBJECTS:
        return isinstance(value, dict)
    if name in ("profiles", "activation_bytes"):
        kind = dict if name == "profiles" else int
        return isinstance(value, (list, tuple)) and all(isinstance(item, kind) for item in value)
    if name == "seconds":
        return isinstance(value, (int, float))
    if name == "engine":  # never a path that leads elsewhere
        return isinstance(value, str) and Path(value).name == value != ""
    return isinstance(value, str) or (name in _OPTIONAL and value is None)


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in one.items() if key not in other or other[key] != value}


def _shown(value: object) -> str:
    """A value in a sentence: digests shortened, pairs without braces."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items()) or "none of them"
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return "none" if value is None else str(value)
