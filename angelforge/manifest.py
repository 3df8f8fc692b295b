"""`angelforge.json`: what a bundle is, and the sizes and digests of its files."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from angelforge.atomic import write_atomic
from angelforge.config import ModelConfig
from angelforge.config_json import Section, describe, read_json_object
from angelforge.draft_config import DraftConfig
from angelforge.errors import AngelForgeError
from angelforge.precision import Precision

FORMAT = 1
FILE = "angelforge.json"
WEIGHTS = "weights/"  # weight files are those below this folder

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST_FILE = 2**63 - 1

T = TypeVar("T")


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 (hex) of a file; of safetensors also the sha256 of the header alone."""

    size: int
    sha256: str
    header_sha256: str | None = None


@dataclass(frozen=True)
class Manifest:
    """All facts about a bundle. Paths are relative to it, with slashes."""

    producer: str  # program and version that wrote it
    model: ModelConfig  # its quantization is that of the bundle's weights
    precision: Precision
    page_size: int  # tokens in a page of the KV pool
    max_context: int  # positions
    operators: Mapping[str, int]  # versions of the operators in the graphs
    graphs: Mapping[str, str]  # by role: {"target": "model.onnx", "draft": "draft.onnx"}
    weights: Literal["packed", "absent"]  # absent: only the graph was exported so far
    files: Mapping[str, FileRecord]
    draft: DraftConfig | None = None  # its graph stands under the role "draft"

    @property
    def model_digest(self) -> str:
        """Digest of the model configuration; engines of equal digests fit the same weights."""
        return self.model.digest()

    @property
    def draft_digest(self) -> str | None:
        """Digest of the draft's configuration, None without a draft."""
        return None if self.draft is None else self.draft.digest()

    @property
    def rope(self) -> dict[str, float | int]:
        """YaRN factor and attention factor (1 without YaRN), and the rotated width of a head."""
        scaling = self.model.rope_scaling
        return {
            "factor": 1.0 if scaling is None else scaling.factor,
            "attention_factor": 1.0 if scaling is None else scaling.attention_factor,
            "rotary_dim": self.model.rotary_dim,
        }

    def to_json(self) -> str:
        """The file's text."""
        content = {
            "format": FORMAT,
            "producer": self.producer,
            "model": self.model.to_dict(),
            "draft": None if self.draft is None else self.draft.to_dict(),
            **self._derived(),
            "precision": self.precision.value,
            "page_size": self.page_size,
            "max_context": self.max_context,
            "operators": dict(sorted(self.operators.items())),
            "graphs": dict(self.graphs),
            "weights": self.weights,
            "files": {name: _compact(record) for name, record in sorted(self.files.items())},
        }
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    def write(self, folder: Path) -> None:
        """Writes `angelforge.json` into a bundle, whole or not at all: the last step of an export."""
        write_atomic(folder / FILE, self.to_json())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads and checks `angelforge.json` of a bundle.

        Raises AngelForgeError when it is absent, of another format version, or not exactly what `write` writes.
        """
        path = folder / FILE
        if not path.is_file():
            raise AngelForgeError(_explain_absence(folder))
        return cls.from_dict(read_json_object(path), str(path))

    @classmethod
    def from_dict(cls, raw: object, source: str = FILE) -> Manifest:
        """The inverse of `to_json` after parsing; `source` names the file in messages."""
        top = Section(raw, source)
        version = top.integer("format", least=0)
        if version != FORMAT:
            raise AngelForgeError(
                f"{source} has format version {version}, this program reads version {FORMAT}. "
                "Use the version of angelforge that wrote it, or export again."
            )
        files = {name: _read_record(record) for name, record in _objects(top, "files").items()}
        manifest = cls(
            producer=top.text("producer"),
            model=ModelConfig.from_saved(top.get("model"), f"{source}: model"),
            precision=Precision(_one_of(top, "precision", [precision.value for precision in Precision])),
            page_size=top.integer("page_size"),
            max_context=top.integer("max_context"),
            operators=_mapping(top, "operators", lambda section, key: int(section.integer(key))),
            graphs=_mapping(top, "graphs", lambda section, key: section.text(key)),
            weights="packed" if _one_of(top, "weights", ["packed", "absent"]) == "packed" else "absent",
            files=files,
            draft=_read_draft(top),
        )
        manifest._check(top)
        return manifest

    def _derived(self) -> dict[str, Any]:
        """Written for readers, computed here."""
        return {
            "model_digest": self.model_digest,
            "draft_digest": self.draft_digest,
            "rope": self.rope,
        }

    def _check(self, top: Section) -> None:
        for key, value in self._derived().items():
            if top.get(key) != value:
                top.fail(key, f"{describe(value)} (as the model says)")
        if unknown := list(top.unread()):
            raise AngelForgeError(f"{top.source} has unknown keys: {', '.join(unknown)}. Export again.")
        if ("draft" in self.graphs) != (self.draft is not None):
            raise AngelForgeError(
                f"{top.source} has a draft's graph without its configuration, or the reverse. Export again."
            )
        if self.draft is not None:
            self.draft.require_target(self.model)
        for name in self.files:
            if not _inside(name):
                raise AngelForgeError(f"{top.source} names the file {name!r}, which is not inside the bundle.")
        if absent := [graph for graph in self.graphs.values() if graph not in self.files]:
            raise AngelForgeError(f"{top.source} has no digest of the graph {absent[0]}. Export again.")
        if any(name.startswith(WEIGHTS) for name in self.files) != (self.weights == "packed"):
            raise AngelForgeError(f"{top.source} says weights {self.weights}, its files say otherwise. Export again.")


def _compact(record: FileRecord) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(record).items() if value is not None}


def _objects(top: Section, key: str) -> dict[str, Section]:
    section = Section(top.get(key), f"{top.source}: {key}")
    return {name: Section(section.get(name), f"{section.source}: {name}") for name in section.raw}


def _mapping(top: Section, key: str, read: Callable[[Section, str], T]) -> dict[str, T]:
    section = Section(top.get(key), f"{top.source}: {key}")
    return {name: read(section, name) for name in section.raw}


def _read_draft(top: Section) -> DraftConfig | None:
    saved = top.get("draft")
    return None if saved is None else DraftConfig.from_saved(saved, f"{top.source}: draft")


def _one_of(top: Section, key: str, allowed: list[str]) -> str:
    if top.get(key) not in allowed:
        top.fail(key, " or ".join(allowed))
    return top.text(key)


def _read_record(section: Section) -> FileRecord:
    for key in ("sha256", "header_sha256"):
        value = section.get(key)
        missing_allowed = key == "header_sha256" and value is None
        if not missing_allowed and not (isinstance(value, str) and _SHA256.fullmatch(value)):
            section.fail(key, "a sha256 of 64 hexadecimal digits")
    record = FileRecord(
        section.integer("size", least=0, most=_LARGEST_FILE), section.text("sha256"), section.get("header_sha256")
    )
    if unknown := list(section.unread()):
        raise AngelForgeError(f"{section.source} has unknown keys: {', '.join(unknown)}. Export again.")
    return record


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return name.isprintable() and "\\" not in name and not path.is_absolute() and ".." not in path.parts and name != ""


def _explain_absence(folder: Path) -> str:
    if not folder.is_dir():
        return f"There is no bundle at {folder}. Write one with: angelforge export CHECKPOINT {folder}"
    if (folder / "config.json").is_file():
        return (
            f"{folder} is a checkpoint, a bundle was expected. Turn it into one with: angelforge export {folder} BUNDLE"
        )
    return f"{folder} is not a finished bundle: it has no {FILE}. Write one with: angelforge export CHECKPOINT {folder}"
