"""The tensors of a Hugging Face checkpoint: every name, shape and allowed type, from the configuration alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from angelforge.config import ModelConfig, Quantization
from angelforge.dtypes import DType

FLOATS = frozenset({DType.BF16, DType.F16, DType.F32})
_E4M3 = frozenset({DType.F8_E4M3})
_F32 = frozenset({DType.F32})

_LAYER = re.compile(r"model\.layers\.([0-9]{1,9})\.")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ExpectedTensor:
    """Shape and allowed element types of one tensor of a checkpoint."""

    shape: Shape
    dtypes: frozenset[DType]


def expected_tensors(config: ModelConfig) -> dict[str, ExpectedTensor]:
    """All tensors of a checkpoint of `config` by name, in the order of the layers.

    In an FP8 checkpoint the projections and experts are e4m3 and each has an f32 `<name>_scale_inv` with one scale for
    a block; embeddings, head, router and norms are not quantised.
    """
    expected = {
        "model.word_embeddings.weight": ExpectedTensor((config.vocab_size, config.hidden_size), FLOATS),
        "model.norm.weight": ExpectedTensor((config.hidden_size,), FLOATS),
    }
    if not config.tie_word_embeddings:
        expected["lm_head.weight"] = expected["model.word_embeddings.weight"]
    plain = _PlainLayer(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for suffix, tensor in (plain.sparse if config.is_moe_layer(layer) else plain.dense).items():
            expected[prefix + suffix] = tensor
    return expected


def is_dropped(name: str, config: ModelConfig) -> bool:
    """Whether a checkpoint may hold `name` although the model does not use it.

    True for the layers after the last one (multi-token prediction; also what `with_layers` cuts off), and for the head
    of a model that uses its embedding as the head.
    """
    if name == "lm_head.weight":
        return config.tie_word_embeddings
    found = _LAYER.match(name)
    return found is not None and int(found[1]) >= config.num_hidden_layers


class _PlainLayer:
    """The tensors of a dense and of a sparse layer: made once, shared by all layers (48,129 names, 20 objects)."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        common = {**self._norms(), **self._attention()}
        self.dense = {**common, **dict(self._mlp("mlp", config.intermediate_size))}
        self.sparse = {**common, **self._experts()} if config.num_moe_layers else {}

    def _norms(self) -> dict[str, ExpectedTensor]:
        c = self._config
        names = {f"{place}_layernorm.weight": (c.hidden_size,) for place in ("input", "post_attention")}
        if c.use_qk_norm:
            names |= {f"attention.{place}_layernorm.weight": (c.head_dim,) for place in ("query", "key")}
        return {name: ExpectedTensor(shape, FLOATS) for name, shape in names.items()}

    def _attention(self) -> dict[str, ExpectedTensor]:
        c = self._config
        return {
            **dict(self._linear("attention.query_key_value.weight", (c.qkv_size, c.hidden_size))),
            **dict(self._linear("attention.dense.weight", (c.hidden_size, c.num_attention_heads * c.head_dim))),
        }

    def _experts(self) -> dict[str, ExpectedTensor]:
        c = self._config
        expected = {
            "mlp.gate.weight": ExpectedTensor((c.num_experts, c.hidden_size), FLOATS),
            "mlp.gate.expert_bias": ExpectedTensor((c.num_experts,), FLOATS),
        }
        one = dict(self._mlp("", c.moe_intermediate_size))
        for expert in range(c.num_experts):
            expected.update({f"mlp.experts.{expert}{suffix}": tensor for suffix, tensor in one.items()})
        if c.num_shared_experts:
            expected.update(self._mlp("mlp.shared_experts", c.moe_intermediate_size * c.num_shared_experts))
        return expected

    def _mlp(self, prefix: str, width: int) -> Iterator[tuple[str, ExpectedTensor]]:
        hidden = self._config.hidden_size
        yield from self._linear(f"{prefix}.gate_proj.weight", (width, hidden))
        yield from self._linear(f"{prefix}.up_proj.weight", (width, hidden))
        yield from self._linear(f"{prefix}.down_proj.weight", (hidden, width))

    def _linear(self, name: str, shape: tuple[int, int]) -> Iterator[tuple[str, ExpectedTensor]]:
        return expected_linear(name, shape, self._config.quantization is not None)


def expected_linear(name: str, shape: tuple[int, int], quantized: bool) -> Iterator[tuple[str, ExpectedTensor]]:
    """The weight of a linear, and its block scales if it is `quantized`."""
    if not quantized:
        yield name, ExpectedTensor(shape, FLOATS)
        return
    rows, columns = (-(-size // block) for size, block in zip(shape, Quantization().block, strict=True))
    yield name, ExpectedTensor(shape, _E4M3)
    yield f"{name}_scale_inv", ExpectedTensor((rows, columns), _F32)
