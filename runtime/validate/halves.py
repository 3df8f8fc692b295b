"""Half a layer at a time beside the independent NumPy model, both given the same random hidden states.

Nothing spreads from one half to the next, so a wrong weight or formula is seen in its own half. Embedding and head are
places of their own. Memory is one layer's: weights of the graph stay mapped, the reference reads one matrix at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from angelforge.config import ModelConfig
from angelforge.runtime.batch import INPUTS, Batch
from angelforge.runtime.packing import Piece, pack
from angelforge.runtime.validate.compare import Finding
from angelforge.runtime.validate.cutting import Array, OrtPiece, cut
from angelforge.runtime.validate.metrics import Difference, difference
from angelforge.runtime.validate.operations import JudgeGraph, Stage
from angelforge.runtime.validate.reference import Reference
from angelforge.runtime.validate.thresholds import F32
from angelforge.runtime.validate.walk import pool_shape

FP8_STEP = 5e-2  # of what a half layer adds to a token, where one of its values is rounded to the e4m3 value beside
FP8_EXACT = 1e-5
FP8_TOUCHED = 0.1  # of the tokens, behind an MLP, that such a step may touch; in wide layers more:
FP8_STEPS = 4e-5  # steps for each e4m3 value of a token; 1e-5 were seen in a layer of the real shape
EMBEDDING, HEAD = "embedding", "head"


@dataclass(frozen=True)
class LayerCheck:
    """Half a layer beside the reference: what it adds to the residual stream; or what embedding or head give."""

    layer: int | None  # None for embedding and head
    half: str  # "attention" or "mlp", "embedding" or "head"
    tokens: int
    result: Difference
    limit: float
    ok: bool
    note: str = ""

    def finding(self) -> Finding:
        """The same among the tensors of a bundle's report."""
        place = self.half if self.layer is None else f"layer {self.layer}"
        half = self.half if self.layer is None else f"{self.half} half"
        tensor = "what it gives" if self.layer is None else "what it adds"
        return Finding(place, f"{half} beside the reference", tensor, 0, self.result, self.limit, self.ok, self.note)

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Halves:
    """The two sides: a graph whose weights lie below `root`, and the reference of the same precision."""

    config: ModelConfig
    judge: JudgeGraph
    root: Path
    reference: Reference
    quantized: bool
    page_size: int
    tokens: int  # random states of every half, one page at most
    seed: int

    def layer(self, layer: int) -> Iterator[LayerCheck]:
        """Both halves of a layer.

        Raises:
            AngelForgeError: ONNX Runtime cannot run it, or the reference's checkpoint is damaged.
        """
        stage = next(stage for stage in self.judge.stages if stage.layer == layer)
        before = self._states(layer)
        inside, delta, routed = self._run_layer(stage, before)
        wide, positions, everything = inside.astype(np.float64), np.arange(self.tokens), np.ones(self.tokens, bool)
        expected, _, _ = self.reference.attention_block(before.astype(np.float64), layer, positions)
        # A step of FP8 in front of attention is seen by every later token: there only its size is judged.
        share = 1.0 if self.quantized else None
        yield _compare(layer, "attention", wide - before, expected - before, everything, share)
        expected, routing = self.reference.mlp_block(wide, layer)
        kept, note = everything, ""
        if routing is not None and routed is not None:
            chosen = np.sort(routed[:, : routing.experts.shape[1]], axis=1)
            same = (np.sort(routing.experts, axis=1) == chosen).all(axis=1)
            tied = ~same & (routing.margins <= F32.tie)
            kept = ~tied
            note = f"{int((~same & ~tied).sum())} of {self.tokens} tokens have other experts" + (
                f"; {int(tied.sum())} ties" if tied.any() else ""
            )
        share = most_touched(self.config, layer) if self.quantized else None
        yield _compare(layer, "mlp", delta.astype(np.float64), expected - wide, kept, share, note)

    def embedding(self) -> LayerCheck:
        """Random tokens of the whole vocabulary."""
        stage = self.judge.stages[0]
        ids = np.random.default_rng([self.seed, 1 << 20]).integers(0, self.config.vocab_size, self.tokens)
        (name,) = stage.outputs
        found = OrtPiece(cut(self.judge.model, ["input_ids"], [name]), self.root).run({"input_ids": ids})[name]
        expected = self.reference.embed(ids)
        return _compare(None, EMBEDDING, found.astype(np.float64), expected, np.ones(self.tokens, bool), None)

    def head(self) -> LayerCheck:
        """The final norm and the logits."""
        stage = self.judge.stages[-1]
        before = self._states(1 << 21)
        inputs = dict.fromkeys(name for operation in stage.operations[:2] for name in operation.inputs)
        given: dict[str, Array] = {"logit_indices": np.arange(self.tokens)}
        for name in (n for n in inputs if n not in given):
            given[name] = np.zeros_like(before) if len(given) > 1 else before
        found = OrtPiece(cut(self.judge.model, list(given), ["logits"]), self.root).run(given)["logits"]
        expected = self.reference.head(before.astype(np.float64))
        return _compare(None, HEAD, found.astype(np.float64), expected, np.ones(self.tokens, bool), None)

    def _states(self, number: int) -> Array:
        rng = np.random.default_rng([self.seed, number])
        return rng.standard_normal((self.tokens, self.config.hidden_size)).astype(np.float32)

    def _run_layer(self, stage: Stage, before: Array) -> tuple[Array, Array, Array | None]:
        """(residual between the halves [T, H], what the MLP adds [T, H], experts int32 [T, k] or None)."""
        residual, delta = [name for name in stage.outputs if name != stage.pool_out]
        routers = [o.outputs[0] for o in stage.operations if o.kind == "MoERoute"]
        session = OrtPiece(cut(self.judge.model, stage.inputs, [residual, delta, *routers]), self.root)
        piece = Piece(np.zeros(self.tokens, np.int64), 0, np.array([1], np.int32), 1)
        batch: Batch = pack([piece], self.page_size)
        values = {name: getattr(batch, name) for name in INPUTS}
        streams = [n for n in stage.inputs if n not in INPUTS and n != stage.pool]
        parts = [before] if len(streams) == 1 else [before, np.zeros_like(before)]
        pool = np.zeros(pool_shape(self.judge, str(stage.pool), 2), np.float32)
        results = session.run({**values, **dict(zip(streams, parts, strict=True)), str(stage.pool): pool})
        return results[residual], results[delta], results[routers[0]] if routers else None


def most_touched(config: ModelConfig, layer: int) -> float:
    """The share of tokens whose MLP may have an e4m3 value that is rounded to the other side, all else being right."""
    experts = config.num_experts_per_tok + config.num_shared_experts
    inner = experts * config.moe_intermediate_size if config.is_moe_layer(layer) else config.intermediate_size
    return max(FP8_TOUCHED, 1 - math.exp(-FP8_STEPS * (config.hidden_size + inner)))


def _compare(
    layer: int | None, half: str, found: Array, expected: Array, kept: Array, touched: float | None, note: str = ""
) -> LayerCheck:
    """`touched` is the share of tokens that steps of FP8 may move; None where nothing is quantised."""
    result = difference(found[kept], expected[kept])
    if touched is None:
        ok = result.relative_error <= F32.layer if F32.layer is not None else True
        return LayerCheck(layer, half, int(kept.sum()), result, F32.layer or 0.0, ok, note)
    with np.errstate(invalid="ignore"):
        by_token = np.abs(found - expected).max(axis=1) / np.abs(expected).max(axis=1)
    exact = float((by_token[kept] < FP8_EXACT).mean())
    ok = bool(by_token[kept].max() < FP8_STEP) and exact >= 1 - touched
    needed = f", {1 - touched:.0%} are needed" if touched < 1 else ""
    told = f"{exact:.0%} of the tokens to {FP8_EXACT:.0e}{needed}" + (f"; {note}" if note else "")
    return LayerCheck(layer, half, int(kept.sum()), result, FP8_STEP, ok, told)
