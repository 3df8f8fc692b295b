"""What `angelforge plan` reads: a configuration and, where there are weights, their headers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from angelforge.bundle import Bundle
from angelforge.checkpoint import Checkpoint
from angelforge.config import ModelConfig
from angelforge.draft_config import DraftConfig
from angelforge.errors import UsageError
from angelforge.hub import CONFIG_FILES, locate
from angelforge.inventory import expected_tensors
from angelforge.manifest import FILE as BUNDLE
from angelforge.precision import Precision, natural_precision
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
    draft: DraftConfig | None = None
    bundle: Bundle | None = None  # where that is what was read

    @property
    def precision(self) -> Precision:
        """A bundle's, or the checkpoint's own."""
        return self.bundle.manifest.precision if self.bundle else natural_precision(self.config)

    @property
    def max_context(self) -> int:
        """Positions of a bundle's tables, or all that the model covers."""
        return self.bundle.manifest.max_context if self.bundle else self.config.max_context

    def to_dict(self) -> dict[str, Any]:
        """All facts as JSON values."""
        facts = {"source": self.source, "parameters": self.parameters, "tensors": self.tensors, "bytes": self.nbytes}
        draft = None if self.draft is None else self.draft.to_dict()
        facts |= {"notes": list(self.notes), "digest": self.config.digest(), "config": self.config.to_dict()}
        return {**facts, "draft": draft}


def read_model(source: str, layers: int | None, rope_scaling: str | None, draft: str | None = None) -> Model:
    """Reads `source`: a folder, a config.json, a bundle, or a Hub id, of which only the configuration is downloaded.

    `layers`, `rope_scaling` and `draft` change the model as they do in `export`. Raises AngelForgeError for a
    malformed configuration and for headers that do not fit it, UsageError for changes to a bundle.
    """
    path = Path(source)
    if (path / BUNDLE).is_file():
        if layers is not None or rope_scaling is not None or draft is not None:
            raise UsageError(f"{source} is a bundle: what it holds was decided when it was exported.")
        return _read_bundle(source)
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
    drafted = None if draft is None else DraftConfig.load(locate(draft, CONFIG_FILES), config)
    return Model(source, config, _parameters(config), notes, tensors, nbytes, drafted)


def _read_bundle(source: str) -> Model:
    bundle = Bundle.open(Path(source))
    manifest = bundle.manifest
    packed = [record.size for name, record in manifest.files.items() if name.startswith("weights/")]
    config = manifest.model
    return Model(source, config, _parameters(config), config.notes, None, sum(packed) or None, manifest.draft, bundle)


def _parameters(config: ModelConfig) -> int:
    shapes = (item.shape for name, item in expected_tensors(config).items() if not name.endswith("_scale_inv"))
    return sum(math.prod(shape) for shape in shapes)
