"""The model configuration that all stages share: sizes, routing, positions, special tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from angelforge.config_checks import check_relations
from angelforge.config_json import read_json_object
from angelforge.config_quantization import Quantization
from angelforge.config_reading import read_fields
from angelforge.config_rope import RopeScaling, parse_rope_scaling
from angelforge.config_saved import restore_fields
from angelforge.errors import UsageError

__all__ = ["ModelConfig", "Quantization", "RopeScaling"]


@dataclass(frozen=True)
class ModelConfig:
    """A BailingMoeV2 model. Names are those of the checkpoint's `config.json`; sizes are element counts.

    Every instance is consistent: creating one checks divisibility and ranges and raises AngelForgeError naming the key.
    """

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int  # RoPE turns the first rotary_dim of head_dim values
    intermediate_size: int  # width of the dense MLPs
    first_k_dense_replace: int  # that many first layers have a dense MLP
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int
    moe_intermediate_size: int  # width of one expert
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    rope_theta: float
    max_position_embeddings: int
    rope_scaling: RopeScaling | None
    rms_norm_eps: float
    use_qk_norm: bool
    tie_word_embeddings: bool
    torch_dtype: str  # of the checkpoint: bfloat16, float16 or float32
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    quantization: Quantization | None
    notes: tuple[str, ...] = ()  # what a user should be told; not part of the identity

    def __post_init__(self) -> None:
        check_relations(self)

    @classmethod
    def from_dict(
        cls, raw: object, generation: dict[str, Any] | None = None, source: str = "config.json"
    ) -> ModelConfig:
        """From the object in a Hugging Face `config.json` and, if given, `generation_config.json`.

        Raises AngelForgeError naming the key for anything missing, malformed, contradictory or unsupported.
        """
        return cls(**read_fields(raw, generation, source))

    @classmethod
    def load(cls, path: str | Path) -> ModelConfig:
        """From a checkpoint folder or a `config.json`; a `generation_config.json` beside it adds its eos ids."""
        file = Path(path)
        if file.is_dir():
            file = file / "config.json"
        generation = file.with_name("generation_config.json")
        return cls.from_dict(
            read_json_object(file), read_json_object(generation) if generation.exists() else None, str(file)
        )

    @classmethod
    def from_saved(cls, saved: object, source: str = "the saved configuration") -> ModelConfig:
        """The inverse of `to_dict`; raises AngelForgeError for anything `to_dict` does not write."""
        return cls(**restore_fields(saved, source, [field.name for field in dataclasses.fields(cls)]))

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        saved = dataclasses.asdict(self)
        for key in ("eos_token_ids", "notes"):
            saved[key] = list(saved[key])
        if self.quantization is not None:
            saved["quantization"]["block"] = list(self.quantization.block)
        return saved

    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON of everything but the notes: equal means the same model shape."""
        identity = {key: value for key, value in self.to_dict().items() if key != "notes"}
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def max_context(self) -> int:
        """Positions that the model covers: the trained length, or what YaRN stretches it to."""
        return self.max_position_embeddings if self.rope_scaling is None else self.rope_scaling.positions

    @property
    def qkv_size(self) -> int:
        """Rows of the fused projection: all queries, all keys, all values."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @property
    def num_expert_slots(self) -> int:
        """Experts in the bundle's stack: routed, then shared."""
        return self.num_experts + self.num_shared_experts

    @property
    def experts_per_token(self) -> int:
        """Experts that a token passes through: chosen and shared."""
        return self.num_experts_per_tok + self.num_shared_experts

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts."""
        return self.num_hidden_layers - self.first_k_dense_replace

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has experts; the first `first_k_dense_replace` layers have a dense MLP."""
        return layer >= self.first_k_dense_replace

    def with_layers(self, count: int) -> ModelConfig:
        """The model cut to its first `count` layers, for comparing real checkpoints on small machines."""
        if not 1 <= count <= self.num_hidden_layers:
            raise UsageError(f"{count} layers were asked for, but the model has {self.num_hidden_layers}.")
        if count == self.num_hidden_layers:
            return self
        return dataclasses.replace(
            self,
            num_hidden_layers=count,
            first_k_dense_replace=min(self.first_k_dense_replace, count),
            notes=(*self.notes, f"Only the first {count} of {self.num_hidden_layers} layers are used."),
        )

    def with_rope_scaling(self, request: str) -> ModelConfig:
        """The model stretched as `request` says, for example ``yarn:4``: four times the trained length."""
        if self.rope_scaling is not None:
            raise UsageError(
                f"Rope scaling {request!r} was asked for, but the checkpoint's configuration already has YaRN with "
                f"factor {self.rope_scaling.factor:g} ({self.max_context} positions). Leave --rope-scaling out."
            )
        scaling = parse_rope_scaling(request, self.max_position_embeddings)
        note = (
            f"YaRN with factor {scaling.factor:g} is on: {scaling.positions} positions; it also changes short prompts "
            f"a little (rotations are multiplied by {scaling.attention_factor:.6f})."
        )
        return dataclasses.replace(self, rope_scaling=scaling, notes=(*self.notes, note))
