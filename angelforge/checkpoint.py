"""A Hugging Face checkpoint seen through its headers: configuration and tensor places, never the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from angelforge.config import ModelConfig
from angelforge.dtypes import DType
from angelforge.errors import AngelForgeError
from angelforge.hub import locate
from angelforge.inventory import ExpectedTensor, expected_tensors, is_dropped
from angelforge.shards import listed, open_tensors
from angelforge.tensorfile import TensorInfo


@dataclass(frozen=True)
class Checkpoint:
    """Configuration and headers of a checkpoint. `tensors` maps every tensor name to where its bytes stand."""

    folder: Path
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, source: str | Path, layers: int | None = None) -> Checkpoint:
        """Opens a folder or Hub id by reading its configuration and headers.

        With `layers` the model is cut to its first layers, and files that hold only later ones may be absent. Raises
        AngelForgeError for anything missing or malformed; whether tensors and configuration fit says `check`.
        """
        folder = locate(source)
        config = ModelConfig.load(folder)
        if layers is not None:
            config = config.with_layers(layers)
        return cls(folder, config, open_tensors(folder, lambda name: not is_dropped(name, config)))

    @property
    def dropped(self) -> list[str]:
        """Names of tensors that the model does not use: layers past the last one, a head tied to the embedding."""
        return [name for name in self.tensors if is_dropped(name, self.config)]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should be told about this checkpoint, one sentence each."""
        dropped = self.dropped
        extra = (f"{len(dropped)} tensors are not used: {listed(dropped)}.",) if dropped else ()
        return (*self.config.notes, *extra)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the model uses."""
        return sum(info.nbytes for name, info in self.tensors.items() if not is_dropped(name, self.config))

    def check(self) -> None:
        """Compares the headers with the configuration.

        Raises one AngelForgeError with all missing, unexpected, misshapen and mistyped tensors: their counts and the
        first few of each.
        """
        expected = expected_tensors(self.config)
        problems = tensor_problems(self.tensors, expected, frozenset(self.dropped))
        if problems:
            raise AngelForgeError(
                f"The tensors of {self.folder} do not fit its config.json: {'; '.join(problems)}. "
                f"{advice(self.tensors, expected, self.config.quantization is not None)}"
            )


def advice(tensors: Mapping[str, TensorInfo], expected: Mapping[str, ExpectedTensor], quantized: bool) -> str:
    """What to do about `tensor_problems`; `quantized` says whether the config.json has a quantization_config."""
    mistyped = any(info.dtype not in expected[name].dtypes for name, info in tensors.items() if name in expected)
    stored_fp8 = any(info.dtype is DType.F8_E4M3 for info in tensors.values())
    if stored_fp8 and not quantized:
        return "They are FP8, but config.json has no quantization_config: fetch the one that belongs to them."
    if mistyped and not stored_fp8 and quantized:
        return "config.json says FP8, but no tensor is: fetch the config.json that belongs to them."
    return "Fetch the checkpoint again, or the config.json that belongs to it."


def tensor_problems(
    tensors: Mapping[str, TensorInfo], expected: Mapping[str, ExpectedTensor], dropped: frozenset[str] = frozenset()
) -> list[str]:
    """What of a checkpoint's headers is not as expected: counts and the first few names of each kind."""
    present = {name: info for name, info in tensors.items() if name in expected}
    kinds = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected and name not in dropped],
        "of another shape": [
            f"{name} is {list(info.shape)}, expected {list(expected[name].shape)}"
            for name, info in present.items()
            if info.shape != expected[name].shape
        ],
        "of another type": [
            _type_problem(info, expected[name])
            for name, info in present.items()
            if info.dtype not in expected[name].dtypes
        ],
    }
    return [f"{len(names)} {kind} ({listed(names)})" for kind, names in kinds.items() if names]


def _type_problem(info: TensorInfo, expected: ExpectedTensor) -> str:
    wanted = " or ".join(sorted(dtype.value for dtype in expected.dtypes))
    return f"{info.name} is {info.dtype.value}, expected {wanted}"
