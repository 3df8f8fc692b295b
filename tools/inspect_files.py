"""What `inspect` tells about a checkpoint folder and about one safetensors file."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from angelforge.tensorfile import TensorFile, TensorInfo, read_tensor_file
from angelforge.tools.output import format_bytes, print_table
from angelforge.tools.plan_model import Model, read_model
from angelforge.tools.plan_report import print_model


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint's configuration and, where it has weights, its headers, which fit the configuration."""

    model: Model

    @classmethod
    def read(cls, folder: Path) -> "CheckpointReport":
        """Read configuration and headers. Raises AngelForgeError where they are malformed or do not fit."""
        return cls(read_model(str(folder), None, None))

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {"kind": "checkpoint", "path": self.model.source, **self.model.to_dict()}

    def show(self) -> None:
        """Print it for people."""
        print_model(self.model)
        facts = self.model.config.to_dict().items()
        print_table(["configuration", ""], [[key, str(value)] for key, value in facts if key != "notes"])


@dataclass(frozen=True)
class TensorFileReport:
    """The header of one safetensors file."""

    file: TensorFile

    @classmethod
    def read(cls, path: Path) -> "TensorFileReport":
        """Read a header. Raises AngelForgeError where it is malformed."""
        return cls(read_tensor_file(path))

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values; offsets are counted from the beginning of the file."""
        tensors = self.file.tensors.values()
        return {
            "kind": "safetensors",
            "path": str(self.file.path),
            "bytes": self.file.size,
            "data_start": self.file.data_start,
            "header_sha256": self.file.header_sha256,
            "metadata": dict(self.file.metadata),
            "tensors": [
                {"name": t.name, "dtype": t.dtype.value, "shape": t.shape, "offset": t.offset, "bytes": t.nbytes}
                for t in tensors
            ],
        }

    def show(self) -> None:
        """Print it for people."""
        tensors = self.file.tensors.values()
        click.echo(f"{self.file.path}: {format_bytes(self.file.size)}, {len(tensors):,} tensors ({_types(tensors)})")
        for key, value in self.file.metadata.items():
            click.echo(f"{key}: {value}")
        rows = [[t.name, t.dtype.value, " × ".join(map(str, t.shape)), format_bytes(t.nbytes)] for t in tensors]
        print_table(["tensor", "type", "shape", "bytes"], rows)


def _types(tensors: Iterable[TensorInfo]) -> str:
    counts = Counter(tensor.dtype.value for tensor in tensors)
    return ", ".join(f"{count:,} {name}" for name, count in counts.most_common())
