"""The independent NumPy drafts of checkpoint folders, nothing rounded that the checkpoint does not round."""

from pathlib import Path
from typing import Any

from angelforge.runtime.validate.draft_reference import DraftReference
from angelforge.runtime.validate.fp8_draft_reference import Fp8DraftReference
from angelforge.runtime.validate.plain_checkpoint import checkpoint_config, checkpoint_tensors


def load_draft_reference(folder: Path, target: Path) -> DraftReference:
    """The reference of a draft's checkpoint folder, for the target in the checkpoint folder `target`."""
    return DraftReference(*_parts(folder, target))


def load_fp8_draft_reference(folder: Path, target: Path) -> Fp8DraftReference:
    """The same in FP8, of a checkpoint that is FP8 or not."""
    return Fp8DraftReference(*_parts(folder, target))


def _parts(folder: Path, target: Path) -> tuple[Any, Any, Any]:
    embedding = checkpoint_tensors(target)("model.word_embeddings.weight")
    return checkpoint_config(folder), checkpoint_tensors(folder), embedding
