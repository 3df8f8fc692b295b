"""A toy model of AntAngelMed's architecture and its EAGLE3 draft: how they are made, and the two checkpoints.

It was trained on invented calls and has no medical value.
"""

from pathlib import Path

_CHECKPOINTS = Path(__file__).parent / "checkpoints"
MODEL = _CHECKPOINTS / "model"
DRAFT = _CHECKPOINTS / "draft"
