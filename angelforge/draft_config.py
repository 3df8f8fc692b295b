"""The configuration of an EAGLE3 draft: one Llama layer that guesses what the target says (MODEL.md, EAGLE3 draft)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from angelforge.config import ModelConfig
from angelforge.config_json import Section, read_json_object
from angelforge.config_quantization import Quantization
from angelforge.draft_reading import read_draft_fields, restore_draft_fields
from angelforge.errors import AngelForgeError

__all__ = ["DraftConfig"]


@dataclass(frozen=True)
class DraftConfig:
    """A draft for one target. Names are those of its `config.json` where it has them; sizes are element counts.

    Every instance is consistent: creating one checks divisibility and ranges and raises AngelForgeError naming the key.
    """

    hidden_size: int  # the target's
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int  # the target's
    draft_vocab_size: int  # tokens that the draft can propose
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int  # what it was trained for; beyond it guesses may be worse
    capture_layers: tuple[int, ...]  # target layers after which the residual stream is taken, in the order of `fc`
    fc_norm: bool  # each captured state is normalised before `fc`
    norm_output: bool  # a step hands on its state after `norm`, not before
    torch_dtype: str  # of the checkpoint
    quantization: Quantization | None  # of the checkpoint's linears; in a bundle of the bundle's
    notes: tuple[str, ...] = ()  # what a user should be told; not part of the identity

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        rules = (
            (
                heads % kv_heads == 0,
                f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}",
            ),
            (self.head_dim % 2 == 0, f"head_dim {self.head_dim} must be even"),
            (self.rope_theta > 1.0, f"rope_theta {self.rope_theta:g} must be greater than 1"),
            (
                self.draft_vocab_size <= self.vocab_size,
                f"draft_vocab_size {self.draft_vocab_size} must be at most vocab_size {self.vocab_size}",
            ),
            (len(self.capture_layers) > 0, "at least one layer of the target must be captured"),
        )
        for holds, message in rules:
            if not holds:
                raise AngelForgeError(f"The draft's configuration is inconsistent: {message}.")

    @classmethod
    def from_dict(cls, raw: object, target: ModelConfig, source: str = "config.json") -> DraftConfig:
        """From the object in the draft's `config.json`, for `target`.

        Raises AngelForgeError naming the key for anything missing, malformed, unsupported or not fitting the target.
        """
        return cls(**read_draft_fields(raw, target, source))

    @classmethod
    def load(cls, folder: Path, target: ModelConfig) -> DraftConfig:
        """From the `config.json` in a draft's checkpoint folder."""
        path = folder / "config.json"
        return cls.from_dict(read_json_object(path), target, str(path))

    @classmethod
    def from_saved(cls, saved: object, source: str = "the saved draft configuration") -> DraftConfig:
        """The inverse of `to_dict`; raises AngelForgeError for anything `to_dict` does not write."""
        return cls(**restore_draft_fields(Section(saved, source), [field.name for field in dataclasses.fields(cls)]))

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        saved = dataclasses.asdict(self)
        if self.quantization is not None:
            saved["quantization"]["block"] = list(self.quantization.block)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in saved.items()}

    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON of everything but the notes: equal means the same draft shape."""
        identity = {key: value for key, value in self.to_dict().items() if key != "notes"}
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def require_target(self, target: ModelConfig) -> None:
        """Raises AngelForgeError if this is not a draft for `target`."""
        for key, found, needed in self._shared(target):
            if found != needed:
                raise AngelForgeError(f"The draft has {key} {found}, but its target has {needed}. Export them again.")
        if outside := [layer for layer in self.capture_layers if layer >= target.num_hidden_layers]:
            raise AngelForgeError(
                f"The draft captures layer {outside[0]}, but its target has {target.num_hidden_layers} layers. "
                "Export them again."
            )

    def _shared(self, target: ModelConfig) -> tuple[tuple[str, int, int], ...]:
        names: Mapping[str, int] = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
        return tuple((name, getattr(self, name), needed) for name, needed in names.items())

    @property
    def qkv_size(self) -> int:
        """Rows of the stacked projection: all queries, all keys, all values."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @property
    def captured_size(self) -> int:
        """Columns of `fc`: the captured states side by side."""
        return len(self.capture_layers) * self.hidden_size

    @property
    def rotary_dim(self) -> int:
        """RoPE turns the whole head."""
        return self.head_dim

    @property
    def rope_scaling(self) -> None:
        """The positions of a draft are never scaled."""
        return None

    @property
    def max_context(self) -> int:
        """Any position: a draft that is used beyond its training makes worse guesses, never a wrong output."""
        return sys.maxsize
