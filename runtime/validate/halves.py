"""Half a layer at a time beside the independent NumPy model, both given the same random hidden states.

Nothing spreads from one half to the next, so a wrong weight or formula is seen in its own half. Embedding, rotary
tables and head are places of their own. Memory is one layer's: weights of the graph stay mapped, the reference reads
one matrix at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from angelforge.config import ModelConfig
from angelforge.runtime.batch import INPUTS, Batch
from angelforge.runtime.packing import Piece, pack
from angelforge.runtime.validate.compare import Finding
from angelforge.runtime.validate.cutting import Array, OrtPiece, cut
from angelforge.runtime.validate.metrics import Difference, Worst, by_row, difference
from angelforge.runtime.validate.operations import JudgeGraph, Stage
from angelforge.runtime.validate.reference import Reference, rope_tables
from angelforge.runtime.validate.thresholds import F32
from angelforge.runtime.validate.walk import pool_shape

FP8_STEP = 5e-2  # of what a half layer adds to a token, where one of its values is rounded to the e4m3 value beside
FP8_EXACT = 1e-5
FP8_TOUCHED = 0.1  # of the tokens, behind half a layer, that such a step may touch; in wide layers more:
FP8_STEPS = 4e-5  # steps for each e4m3 value of a token; 1e-5 were seen in a layer of the real shape
FP8_RUN = 2  # tokens of a sequence of attention: a step is seen by all later tokens of its sequence
EMBEDDING, HEAD = "embedding", "head"
TABLES = ("rope.cos", "rope.sin")
ROWS = 1024  # of the embedding, compared at once


@dataclass(frozen=True)
class LayerCheck:
    """Half a layer beside the reference: what it adds to the residual stream; or what embedding or head give."""

    layer: int | None  # None for embedding, tables and head
    half: str  # "attention" or "mlp", "embedding", "rope.cos", "rope.sin" or "head"
    tokens: int
    result: Difference
    limit: float
    ok: bool
    note: str = ""

    def finding(self) -> Finding:
        """The same among the tensors of a bundle's report."""
        place = self.half if self.layer is None else f"layer {self.layer}"
        if self.half in TABLES:
            told = "rotary table beside the reference", self.half
            return Finding(place, *told, 0, self.result, self.limit, self.ok, self.note)
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
    ids: Array | None = None  # int64: tokens that the embedding is compared of, beside random ones

    def layer(self, layer: int) -> Iterator[LayerCheck]:
        """Both halves of a layer.

        Raises:
            AngelForgeError: ONNX Runtime cannot run it, or the reference's checkpoint is damaged.
        """
        stage = next(stage for stage in self.judge.stages if stage.layer == layer)
        before = self._states(layer)
        inside, delta, routed = self._run_layer(stage, before)
        wide, everything = inside.astype(np.float64), np.ones(self.tokens, bool)
        yield self._attention(layer, stage, before, wide)
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

    def _attention(self, layer: int, stage: Stage, before: Array, inside: Array) -> LayerCheck:
        """One sequence, and in FP8 short ones as well: there steps do not spread, and most tokens must be exact."""
        wide = before.astype(np.float64)
        expected, _, _ = self.reference.attention_block(wide, layer, np.arange(self.tokens))
        found, wanted, everything = inside - wide, expected - wide, np.ones(self.tokens, bool)
        if not self.quantized:
            return _compare(layer, "attention", found, wanted, everything, None)
        places = np.arange(self.tokens)
        expected, _, _ = self.reference.attention_block(wide, layer, places % FP8_RUN, places // FP8_RUN)
        (short,) = self._run(stage, before, self._stream(stage)[:1], FP8_RUN)
        found, wanted = (np.concatenate(pair) for pair in ((found, short - wide), (wanted, expected - wide)))
        judged = np.arange(2 * self.tokens) >= self.tokens
        share = most_touched(self.config, None)
        return _compare(layer, "attention", found, wanted, np.ones(2 * self.tokens, bool), share, "", judged)

    def embedding(self) -> LayerCheck:
        """The rows of `ids`, and random ones of the whole vocabulary; elements are told by their token ids."""
        rng = np.random.default_rng([self.seed, 1 << 20])
        drawn = rng.integers(0, self.config.vocab_size, self.tokens)
        ids = np.unique(drawn if self.ids is None else np.concatenate([self.ids, drawn])).astype(np.int64)
        (name,) = self.judge.stages[0].outputs
        piece = OrtPiece(cut(self.judge.model, ["input_ids"], [name]), self.root)
        checks = []
        for begin in range(0, len(ids), ROWS):
            part = ids[begin : begin + ROWS]
            found, expected = piece.run({"input_ids": part})[name].astype(np.float64), self.reference.embed(part)
            check = _compare(None, EMBEDDING, found, expected, np.ones(len(part), bool), None)
            worst = tuple(Worst((int(part[w.index[0]]), *w.index[1:]), w.expected, w.found) for w in check.result.worst)
            # Rows are copied: each is judged by its own largest value.
            row = float(by_row(found, expected).max())
            ok = row <= check.limit
            note = "rows are token ids" if ok else f"{row:.2e} of the largest value of a row; rows are token ids"
            checks.append(replace(check, result=replace(check.result, worst=worst), ok=check.ok and ok, note=note))
        return replace(max(checks, key=lambda c: (not c.ok, c.result.relative_error)), tokens=len(ids))

    def tables(self) -> Iterator[LayerCheck]:
        """Cosines and sines of every position that the bundle covers."""
        for index, name in enumerate(TABLES):
            stored = self.judge.model.graph.initializers[name].const_value
            assert stored is not None
            found = stored.numpy().astype(np.float64)
            expected = rope_tables(self.reference.config, np.arange(len(found)))[index]
            yield _compare(None, name, found, expected, np.ones(len(found), bool), None)

    def head(self) -> LayerCheck:
        """The final norm and the logits."""
        stage = next(stage for stage in self.judge.stages if stage.place == "head")
        before = self._states(1 << 21)
        given: dict[str, Array] = {"logit_indices": np.arange(self.tokens)}
        for name in (n for n in stage.inputs if n not in given):
            given[name] = np.zeros_like(before) if len(given) > 1 else before
        found = OrtPiece(cut(self.judge.model, list(given), ["logits"]), self.root).run(given)["logits"]
        expected = self.reference.head(before.astype(np.float64))
        return _compare(None, HEAD, found.astype(np.float64), expected, np.ones(self.tokens, bool), None)

    def _states(self, number: int) -> Array:
        rng = np.random.default_rng([self.seed, number])
        return rng.standard_normal((self.tokens, self.config.hidden_size)).astype(np.float32)

    def _run_layer(self, stage: Stage, before: Array) -> tuple[Array, Array, Array | None]:
        """(residual between the halves [T, H], what the MLP adds [T, H], experts int32 [T, k] or None)."""
        routers = [o.outputs[0] for o in stage.operations if o.kind == "MoERoute"]
        residual, delta, *routed = self._run(stage, before, [*self._stream(stage), *routers], self.tokens)
        return residual, delta, routed[0] if routed else None

    def _stream(self, stage: Stage) -> list[str]:
        """The two parts of the residual stream that the next layer or the head takes: between the halves, and the MLP.

        A draft may take a third output of the layer.
        """
        later = self.judge.stages[self.judge.stages.index(stage) + 1 :]
        taken = next(s for s in later if s.layer is not None or s.place == "head").inputs
        return [name for name in stage.outputs if name in taken]

    def _run(self, stage: Stage, before: Array, names: list[str], length: int) -> list[Array]:
        """Values of a layer, the states being those of sequences of `length`, a page each at most."""
        session = OrtPiece(cut(self.judge.model, stage.inputs, names), self.root)
        starts = range(0, self.tokens, length)
        pieces = [
            Piece(np.zeros(min(length, self.tokens - start), np.int64), 0, np.array([page], np.int32), 1)
            for page, start in enumerate(starts, 1)
        ]
        batch: Batch = pack(pieces, self.page_size)
        values = {name: getattr(batch, name) for name in INPUTS}
        streams = [n for n in stage.inputs if n not in INPUTS and n != stage.pool]
        parts = [before] if len(streams) == 1 else [before, np.zeros_like(before)]
        pool = np.zeros(pool_shape(self.judge, str(stage.pool), len(pieces) + 1), np.float32)
        results = session.run({**values, **dict(zip(streams, parts, strict=True)), str(stage.pool): pool})
        return [results[name] for name in names]


def most_touched(config: ModelConfig, layer: int | None) -> float:
    """The share of tokens that may see an e4m3 value rounded to the other side, all else being right.

    Behind the MLP of a layer; with None behind attention, in sequences of `FP8_RUN`.
    """
    experts = config.num_experts_per_tok + config.num_shared_experts
    if layer is None:
        values = FP8_RUN * config.hidden_size + config.num_attention_heads * config.head_dim
    elif config.is_moe_layer(layer):
        values = config.hidden_size + experts * config.moe_intermediate_size
    else:
        values = config.hidden_size + config.intermediate_size
    return max(FP8_TOUCHED, 1 - math.exp(-FP8_STEPS * values))


def _compare(
    layer: int | None,
    half: str,
    found: Array,
    expected: Array,
    kept: Array,
    touched: float | None,
    note: str = "",
    judged: Array | None = None,
) -> LayerCheck:
    """`touched` is the share of tokens, of those `judged`, that steps of FP8 may move; None: nothing is quantised."""
    result = difference(found[kept], expected[kept])
    if touched is None:
        ok = result.relative_error <= F32.layer if F32.layer is not None else True
        return LayerCheck(layer, half, int(kept.sum()), result, F32.layer or 0.0, ok, note)
    with np.errstate(invalid="ignore"):
        by_token = np.abs(found - expected).max(axis=1) / np.abs(expected).max(axis=1)
    exact = float((by_token[kept if judged is None else judged] < FP8_EXACT).mean())
    ok = bool(by_token[kept].max() < FP8_STEP) and exact >= 1 - touched
    told = f"{exact:.0%} of the tokens to {FP8_EXACT:.0e}, {1 - touched:.0%} are needed" + (f"; {note}" if note else "")
    return LayerCheck(layer, half, int(kept.sum()), result, FP8_STEP, ok, told)
