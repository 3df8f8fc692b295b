"""`manifest.json` beside every engine: what it was made from and for, compared before it is loaded."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from angelforge.errors import AngelForgeError

FORMAT = 1
FILE = "manifest.json"


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
    format: int = FORMAT

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def load(cls, folder: Path) -> "EngineManifest":
        """Reads the manifest in `folder`.

        Raises:
            AngelForgeError: there is none, or it is not one of this format.
        """
        path = folder / FILE
        rebuild = "Build the engine again: angelforge build."
        try:
            raw: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise AngelForgeError(f"There is no engine in {folder} (no {FILE}). {rebuild}") from error
        except (OSError, ValueError) as error:
            raise AngelForgeError(f"{path} cannot be read: {error}. {rebuild}") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
            raise AngelForgeError(f"{path} has format {found}, this version reads {FORMAT}. {rebuild}")
        wanted = {field.name for field in fields(cls)}
        if set(raw) != wanted:
            raise AngelForgeError(f"{path} has wrong keys: {sorted(set(raw) ^ wanted)}. {rebuild}")
        return cls(**raw)

    def require(self, expected: Mapping[str, object]) -> None:
        """Compares facts by name.

        Raises:
            AngelForgeError: for the first fact that differs: what the engine has, what is needed, the fix.
        """
        for name, needed in expected.items():
            found = getattr(self, name)
            if found != needed:
                raise AngelForgeError(
                    f"The engine for {self.target} was built with {name.replace('_', ' ')} {found}, "
                    f"this needs {needed}. Build it again: angelforge build --target {self.target}."
                )


def file_digest(path: Path) -> str:
    """sha256 of a file that fits into memory, such as a graph or an engine."""
    return sha256(path.read_bytes()).hexdigest()
