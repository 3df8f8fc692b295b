"""What an export reads: a checkpoint, or its configuration alone, and the draft that goes with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from angelforge.checkpoint import Checkpoint
from angelforge.config import ModelConfig
from angelforge.draft_checkpoint import DraftCheckpoint
from angelforge.draft_config import DraftConfig
from angelforge.errors import UsageError
from angelforge.exporter.draft_layout import draft_sources
from angelforge.hub import CONFIG_FILES, locate
from angelforge.manifest import FILE as BUNDLE_FILE


@dataclass(frozen=True)
class Sources:
    """Configurations, and where the bytes of all tensors stand."""

    folder: Path  # of the target's checkpoint
    config: ModelConfig
    draft: DraftConfig | None
    checkpoint: Checkpoint | None  # with the draft's tensors under their names in the bundle; None: no weights

    @classmethod
    def open(
        cls,
        source: str,
        draft: str | None,
        *,
        layers: int | None,
        rope_scaling: str | None,
        graph_only: bool,
        extra_files: Sequence[str],
    ) -> Sources:
        """Opens and checks both checkpoints; with `graph_only` nothing but their configurations.

        The target is cut to its first `layers` and stretched by `rope_scaling` where they are given. `extra_files` of
        it are fetched too where it is a Hub id. Raises AngelForgeError for a checkpoint that is damaged, not of this
        architecture, or a draft of another target.
        """
        if (Path(source) / BUNDLE_FILE).is_file():
            raise UsageError(f"{source} is a bundle already; what is exported is a checkpoint.")
        if graph_only:
            file = Path(source) if Path(source).is_file() else None
            folder = file.parent if file else locate(source, (*CONFIG_FILES, *extra_files))
            config = ModelConfig.load(file or folder)
            config = _supported(config if layers is None else config.with_layers(layers), rope_scaling)
            drafted = None if draft is None else DraftConfig.load(locate(draft, CONFIG_FILES), config)
            return cls(folder, config, drafted, None)
        checkpoint = Checkpoint.open(source, layers)
        checkpoint.check()
        config = _supported(checkpoint.config, rope_scaling)
        if draft is None:
            return cls(checkpoint.folder, config, None, checkpoint)
        opened = DraftCheckpoint.open(draft, config)
        opened.check()
        both = {**checkpoint.tensors, **draft_sources(opened)}
        return cls(checkpoint.folder, config, opened.config, dataclasses.replace(checkpoint, tensors=both))


def require_exportable(config: ModelConfig) -> None:
    """Raises UsageError for a model that there is no graph for."""
    if not config.use_qk_norm:
        raise UsageError("The checkpoint has use_qk_norm false; only models with QK-norm can be exported.")


def _supported(config: ModelConfig, rope_scaling: str | None) -> ModelConfig:
    require_exportable(config)
    return config if rope_scaling is None else config.with_rope_scaling(rope_scaling)
