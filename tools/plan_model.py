"""What `angelforge plan` reads: a configuration and, where there are weights, their headers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from angelforge.checkpoint import Checkpoint
from angelforge.config import ModelConfig
from angelforge.hub import CONFIG_FILES, locate
from angelforge.inventory import expected_tensors
from angelforge.shards import INDEX, SINGLE


@dataclass(frozen=True)
class Model:
    """What was read: configuration, parameters, and the checked headers if there were any."""

    source: str
    config: ModelConfig
    parameters: int
    notes: tuple[str, ...]
    tensors: int | None  # None if only the configuration was read
    nbytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """All facts as JSON values."""
        facts = {"source": self.source, "parameters": self.parameters, "tensors": self.tensors, "bytes": self.nbytes}
        return {**facts, "notes": list(self.notes), "digest": self.config.digest(), "config": self.config.to_dict()}


def read_model(source: str, layers: int | None, rope_scaling: str | None) -> Model:
    """Reads `source`: a folder, a config.json, or a Hub id, of which only the configuration is downloaded.

    `layers` and `rope_scaling` change the model as they do in `export`. Raises AngelForgeError for a malformed
    configuration and for headers that do not fit it.
    """
    path = Path(source)
    tensors: int | None = None
    nbytes: int | None = None
    if path.is_dir() and any((path / name).exists() for name in (INDEX, SINGLE)):
        checkpoint = Checkpoint.open(path, layers)
        checkpoint.check()
        config, notes = checkpoint.config, checkpoint.notes
        tensors, nbytes = len(checkpoint.tensors) - len(checkpoint.dropped), checkpoint.nbytes
    else:
        config = ModelConfig.load(path if path.is_file() else locate(source, CONFIG_FILES))
        config = config if layers is None else config.with_layers(layers)
        notes = config.notes
    if rope_scaling is not None:
        stretched = config.with_rope_scaling(rope_scaling)
        config, notes = stretched, (*notes, *stretched.notes[len(config.notes) :])
    shapes = (item.shape for name, item in expected_tensors(config).items() if not name.endswith("_scale_inv"))
    return Model(source, config, sum(math.prod(shape) for shape in shapes), notes, tensors, nbytes)
