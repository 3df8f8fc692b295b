"""The checkpoint of an EAGLE3 draft, compared with the target it was trained for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from angelforge.checkpoint import advice, tensor_problems
from angelforge.config import ModelConfig
from angelforge.draft_config import DraftConfig
from angelforge.dtypes import DType
from angelforge.errors import AngelForgeError
from angelforge.hub import locate
from angelforge.inventory import FLOATS, ExpectedTensor, expected_linear
from angelforge.shards import open_tensors
from angelforge.tensorfile import TensorInfo, read_tensor


@dataclass(frozen=True)
class DraftCheckpoint:
    """Configuration and headers of a draft. `tensors` maps every tensor name to where its bytes stand."""

    folder: Path
    config: DraftConfig
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, source: str | Path, target: ModelConfig) -> DraftCheckpoint:
        """Opens a folder or Hub id by reading its configuration and headers.

        Raises AngelForgeError for anything missing or malformed, or a configuration that does not fit `target`.
        """
        folder = locate(source)
        return cls(folder, DraftConfig.load(folder, target), open_tensors(folder, lambda name: True))

    def check(self) -> None:
        """Compares the headers with the configuration, and d2t with t2d (the only tensors that are read).

        Raises one AngelForgeError with all missing, unexpected, misshapen and mistyped tensors, or what is wrong with
        the vocabulary.
        """
        fc = self.tensors.get("fc.weight")
        quantized = self.config.quantization is not None
        expected = expected_draft_tensors(self.config, quantized and fc is not None and fc.dtype is DType.F8_E4M3)
        problems = tensor_problems(self.tensors, expected)
        if problems:
            raise AngelForgeError(
                f"The tensors of the draft {self.folder} do not fit its config.json: {'; '.join(problems)}. "
                f"{advice(self.tensors, expected, quantized)}"
            )
        self._check_vocabulary()

    def _check_vocabulary(self) -> None:
        offsets = read_tensor(self.tensors["d2t"])  # int64 [draft_vocab_size]
        known = read_tensor(self.tensors["t2d"]).astype(bool)  # [vocab_size]
        size = self.config.vocab_size
        ids = np.arange(len(offsets)) + np.clip(offsets, -size, size)
        if outside := np.flatnonzero((ids < 0) | (ids >= size)).tolist():
            wrong = f"d2t sends draft token {outside[0]} out of the target's vocabulary of {size}"
        elif len(np.unique(ids)) < len(ids):
            wrong = "d2t sends two draft tokens to one token of the target"
        elif known.sum() != len(ids) or not known[ids].all():
            wrong = f"d2t names {len(ids)} tokens of the target, t2d marks {known.sum()} and not the same ones"
        else:
            return
        raise AngelForgeError(f"The draft {self.folder} has a damaged vocabulary: {wrong}. Fetch the draft again.")


def expected_draft_tensors(config: DraftConfig, quantized_fc: bool = False) -> dict[str, ExpectedTensor]:
    """All tensors of a draft's checkpoint by name.

    In an FP8 one the projections of its layer are e4m3 with block scales, as a target's are, and so may `fc` be
    (`quantized_fc`); head and norms are not.
    """
    hidden, width = config.hidden_size, config.intermediate_size
    queries, pairs = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    linears = {
        "midlayer.self_attn.q_proj.weight": (queries, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (pairs, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (pairs, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, queries),
        "midlayer.mlp.gate_proj.weight": (width, hidden),
        "midlayer.mlp.up_proj.weight": (width, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, width),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "norm.weight": (hidden,),
        "lm_head.weight": (config.draft_vocab_size, hidden),
    }
    if config.fc_norm:
        shapes |= {f"fc_norm.{i}.weight": (hidden,) for i in range(len(config.capture_layers))}
    expected = dict(expected_linear("fc.weight", (hidden, config.captured_size), quantized_fc))
    for name, shape in linears.items():
        expected.update(expected_linear(name, shape, config.quantization is not None))
    return {
        **expected,
        **{name: ExpectedTensor(shape, FLOATS) for name, shape in shapes.items()},
        "d2t": ExpectedTensor((config.draft_vocab_size,), frozenset({DType.I64})),
        "t2d": ExpectedTensor((config.vocab_size,), frozenset({DType.BOOL})),
    }
