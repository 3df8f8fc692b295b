"""Random EAGLE3 drafts for small targets, in the layout of published ones: for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from angelforge.config import ModelConfig
from angelforge.config_json import read_json_object
from angelforge.diskerrors import explained
from angelforge.draft_checkpoint import expected_draft_tensors
from angelforge.draft_config import DraftConfig
from angelforge.draft_reading import ARCHITECTURE
from angelforge.dtypes import DType
from angelforge.exporter.synthetic import write_json
from angelforge.exporter.synthetic_config import FP8_BLOCK
from angelforge.exporter.synthetic_values import Spec, checkpoint_values
from angelforge.tensorfile import encode_header

_STORED = {
    "BF16": (DType.BF16, "bfloat16"),
    "F16": (DType.F16, "float16"),
    "F32": (DType.F32, "float32"),
    "FP8": (DType.BF16, "bfloat16"),
}

#: config.json of the published draft for AntAngelMed's architecture (MODEL.md, EAGLE3 draft).
FULL_DRAFT_CONFIG: dict[str, Any] = {
    "architectures": [ARCHITECTURE],
    "attention_bias": False,
    "bos_token_id": 163584,
    "draft_vocab_size": 32000,
    "eos_token_id": 163585,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 1,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 157184,
}


def small_draft_config(target: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """The config.json of a small draft for a target with the config.json `target`; `overrides` replace or add keys.

    4 heads of 32 over 2 KV heads, half of the target's vocabulary, the target's first, second and last layer captured.
    """
    layers = [0, 1, target["num_hidden_layers"] - 1]
    return {
        **FULL_DRAFT_CONFIG,
        "draft_vocab_size": target["vocab_size"] // 2,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": layers, "use_aux_hidden_state": True},
        "head_dim": 32,
        "hidden_size": target["hidden_size"],
        "intermediate_size": 384,
        "max_position_embeddings": target["max_position_embeddings"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": target["vocab_size"],
        **overrides,
    }


def write_draft(
    folder: str | Path,
    target: str | Path,
    config: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    dtype: Literal["BF16", "F16", "F32", "FP8"] = "BF16",
) -> Path:
    """Writes a random draft for the checkpoint folder `target` and returns its folder.

    `config` is its config.json, by default `small_draft_config` of the target's. Values depend on `seed` alone. In FP8
    the projections of its layer and `fc` are e4m3 with block scales, as quantisers of whole models write them. Raises
    AngelForgeError when the configurations do not fit or the folder cannot be written.
    """
    folder, target = Path(folder), Path(target)
    model = ModelConfig.load(target)
    stored, torch_name = _STORED[dtype]
    content = {**(config or small_draft_config(read_json_object(target / "config.json"))), "torch_dtype": torch_name}
    content |= {"quantization_config": FP8_BLOCK} if dtype == "FP8" else {}
    draft = DraftConfig.from_dict(content, model)
    expected = expected_draft_tensors(draft, quantized_fc=dtype == "FP8")
    specs = [
        Spec(name, tensor.shape, stored if stored in tensor.dtypes else next(iter(tensor.dtypes)))
        for name, tensor in expected.items()
    ]
    ids = np.sort(np.random.default_rng(seed).choice(draft.vocab_size, draft.draft_vocab_size, replace=False))
    with explained("create", folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    with explained("write", path), path.open("wb") as file:
        file.write(encode_header([(spec.name, spec.dtype, spec.shape) for spec in specs], {"format": "pt"}, align=8))
        for array in _values(specs, ids, seed):
            file.write(np.ascontiguousarray(array).tobytes())
    write_json(folder / "config.json", content)
    return folder


def _values(specs: Sequence[Spec], ids: NDArray[np.int64], seed: int) -> Iterator[NDArray[Any]]:
    """The values of each of `specs`, in order; a scale stands behind its weight."""
    vocabulary = {"d2t": ids - np.arange(len(ids)), "t2d": np.isin(np.arange(*specs[-1].shape), ids)}
    # Norms are called by a name that says so.
    named = [
        replace(spec, name=spec.name.replace("norm.weight", "_layernorm.weight")) if len(spec.shape) == 1 else spec
        for spec in specs
        if spec.name not in vocabulary
    ]
    weights = checkpoint_values(named, seed)
    return (vocabulary[spec.name] if spec.name in vocabulary else next(weights) for spec in specs)
