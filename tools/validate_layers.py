"""`angelforge validate CHECKPOINT --layers …`: single layers of any checkpoint beside the independent NumPy model.

Only the layers that are named are packed, one after another into a temporary folder; memory is one layer's. Both sides
are given the same random hidden states, half a layer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir

from angelforge.checkpoint import Checkpoint
from angelforge.config import ModelConfig
from angelforge.errors import UsageError
from angelforge.exporter.export import PAGE_SIZE
from angelforge.exporter.graph import build_graph
from angelforge.exporter.layout import bundle_tensors, locate, plan_shards
from angelforge.exporter.packer import pack
from angelforge.precision import Precision, natural_precision
from angelforge.runtime.batch import INPUTS, Batch
from angelforge.runtime.packing import Piece
from angelforge.runtime.packing import pack as pack_tokens
from angelforge.runtime.validate.cutting import Array, OrtPiece, cut
from angelforge.runtime.validate.metrics import Difference, difference
from angelforge.runtime.validate.operations import JudgeGraph, Stage, prepare_judge
from angelforge.runtime.validate.plain_checkpoint import checkpoint_config, checkpoint_tensors
from angelforge.runtime.validate.reference import Reference
from angelforge.runtime.validate.references import reference_like
from angelforge.runtime.validate.thresholds import F32
from angelforge.runtime.validate.walk import pool_shape

FP8_STEP = 3e-2  # of what a half layer adds to a token, where one of its values is rounded to the e4m3 value beside
FP8_EXACT = 1e-5
FP8_TOUCHED = 0.1  # of the tokens, behind an MLP, that such a step may touch; in wide layers more:
FP8_STEPS = 4e-5  # steps for each e4m3 value of a token; 1e-5 were seen in a layer of the real shape


@dataclass(frozen=True)
class LayerCheck:
    """Half a layer beside the reference: what it adds to the residual stream."""

    layer: int
    half: str  # "attention" or "mlp"
    tokens: int
    result: Difference
    limit: float
    ok: bool
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def check_layers(
    folder: Path, layers: list[int], tokens: int, seed: int, report: Callable[[int, int], None]
) -> list[LayerCheck]:
    """Both halves of every layer named, `tokens` random hidden states each.

    Raises:
        UsageError: a layer that the checkpoint does not have.
        AngelForgeError: the checkpoint is damaged, or the temporary folder's disk too small.
    """
    checkpoint = Checkpoint.open(str(folder))
    config = checkpoint.config
    if max(layers) >= config.num_hidden_layers:
        raise UsageError(
            f"--layers names layer {max(layers)}, but the checkpoint has layers 0 to {config.num_hidden_layers - 1}."
        )
    precision = natural_precision(config)
    tokens = min(tokens, PAGE_SIZE, config.max_context)
    judge = prepare_judge(build_graph(config, precision, PAGE_SIZE, tokens))
    given = checkpoint_config(checkpoint.folder), checkpoint_tensors(checkpoint.folder)
    reference = reference_like(precision, *given, keep=False)
    checks: list[LayerCheck] = []
    for done, layer in enumerate(layers):
        with TemporaryDirectory(prefix="angelforge-layer-") as scratch:
            _pack_layer(checkpoint, config, precision, layer, tokens, judge.model, Path(scratch))
            touched = _most_touched(config, layer) if precision.quantized else None
            checks += _check(judge, reference, layer, tokens, seed, Path(scratch), touched)
        report(done + 1, len(layers))
    return checks


def _pack_layer(
    checkpoint: Checkpoint,
    config: ModelConfig,
    precision: Precision,
    layer: int,
    positions: int,
    model: ir.Model,
    folder: Path,
) -> None:
    """Packs the weights of one layer and points the graph's initializers at them."""
    prefixes = (f"model.layers.{layer}.", "rope.")
    chosen = [t for t in bundle_tensors(config, precision, positions) if t.name.startswith(prefixes)]
    shards = plan_shards(chosen)
    pack(checkpoint, shards, folder)
    for name, place in locate(chosen, shards).items():
        value = model.graph.initializers[name]
        assert value.dtype is not None and value.shape is not None
        value.const_value = ir.ExternalTensor(
            place.file, place.offset, place.length, value.dtype, shape=value.shape, name=name
        )


def _most_touched(config: ModelConfig, layer: int) -> float:
    """The share of tokens whose MLP may have an e4m3 value that is rounded to the other side, all else being right."""
    experts = config.num_experts_per_tok + (config.num_shared_experts or 0)
    inner = experts * config.moe_intermediate_size if config.is_moe_layer(layer) else config.intermediate_size
    return max(FP8_TOUCHED, 1 - math.exp(-FP8_STEPS * (config.hidden_size + inner)))


def _check(
    judge: JudgeGraph, reference: Reference, layer: int, tokens: int, seed: int, root: Path, touched: float | None
) -> Iterator[LayerCheck]:
    """`touched` is the share of tokens that FP8 may move; None where nothing is quantised."""
    stage = next(stage for stage in judge.stages if stage.layer == layer)
    rng = np.random.default_rng([seed, layer])
    before = rng.standard_normal((tokens, reference.config["hidden_size"])).astype(np.float32)
    inside, delta, routed = _run_graph(judge, stage, before, tokens, root)
    wide, positions = inside.astype(np.float64), np.arange(tokens)
    expected, _, _ = reference.attention_block(before.astype(np.float64), layer, positions)
    yield _compare(layer, "attention", wide - before, expected - before, np.ones(tokens, bool), touched)
    expected, routing = reference.mlp_block(wide, layer)
    kept, note = np.ones(tokens, bool), ""
    if routing is not None and routed is not None:
        same = (np.sort(routing.experts, axis=1) == np.sort(routed[:, : routing.experts.shape[1]], axis=1)).all(axis=1)
        tied = ~same & (routing.margins <= F32.tie)
        kept = ~tied
        note = f"{int((~same & ~tied).sum())} of {tokens} tokens have other experts" + (
            f"; {int(tied.sum())} ties" if tied.any() else ""
        )
    yield _compare(layer, "mlp", delta.astype(np.float64), expected - wide, kept, touched, note)


def _run_graph(
    judge: JudgeGraph, stage: Stage, before: Array, tokens: int, root: Path
) -> tuple[Array, Array, Array | None]:
    """(residual between the halves [T, H], what the MLP adds [T, H], experts int32 [T, k] or None)."""
    residual, delta = [name for name in stage.outputs if name != stage.pool_out]
    routers = [o.outputs[0] for o in stage.operations if o.kind == "MoERoute"]
    session = OrtPiece(cut(judge.model, stage.inputs, [residual, delta, *routers]), root)
    batch: Batch = pack_tokens([Piece(np.zeros(tokens, np.int64), 0, np.array([1], np.int32), 1)], PAGE_SIZE)
    values = {name: getattr(batch, name) for name in INPUTS}
    streams = [n for n in stage.inputs if n not in INPUTS and n != stage.pool]
    parts = [before] if len(streams) == 1 else [before, np.zeros_like(before)]
    pool = np.zeros(pool_shape(judge, str(stage.pool), 2), np.float32)
    results = session.run({**values, **dict(zip(streams, parts, strict=True)), str(stage.pool): pool})
    return results[residual], results[delta], results[routers[0]] if routers else None


def _compare(
    layer: int, half: str, found: Array, expected: Array, kept: Array, touched: float | None, note: str = ""
) -> LayerCheck:
    result = difference(found[kept], expected[kept])
    if touched is None:
        ok = result.relative_error <= F32.layer if F32.layer is not None else True
        return LayerCheck(layer, half, int(kept.sum()), result, F32.layer or 0.0, ok, note)
    by_token = np.abs(found - expected).max(axis=1) / np.abs(expected).max(axis=1)
    exact = float((by_token[kept] < FP8_EXACT).mean())
    # A step in front of attention is seen by every later token, so only the MLP's are counted.
    counted = half == "mlp"
    ok = bool(by_token[kept].max() < FP8_STEP) and (not counted or exact >= 1 - touched)
    needed = f", {1 - touched:.0%} are needed" if counted else ""
    told = f"{exact:.0%} of the tokens to {FP8_EXACT:.0e}{needed}" + (f"; {note}" if note else "")
    return LayerCheck(layer, half, int(kept.sum()), result, FP8_STEP, ok, told)
