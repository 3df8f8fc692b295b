"""`angelforge validate CHECKPOINT --layers …`: single layers of any checkpoint beside the independent NumPy model.

Only the layers that are named are packed, one after another into a temporary folder; memory is one layer's. Both sides
are given the same random hidden states, half a layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from angelforge.checkpoint import Checkpoint
from angelforge.config import ModelConfig
from angelforge.errors import UsageError
from angelforge.exporter.export import PAGE_SIZE
from angelforge.exporter.graph import build_graph
from angelforge.exporter.layout import bundle_tensors, locate, plan_shards
from angelforge.exporter.packer import pack
from angelforge.precision import Precision, natural_precision
from angelforge.runtime.validate.halves import Halves, LayerCheck
from angelforge.runtime.validate.operations import prepare_judge
from angelforge.runtime.validate.plain_checkpoint import checkpoint_config, checkpoint_tensors
from angelforge.runtime.validate.references import reference_like


def check_layers(
    folder: Path, layers: list[int], tokens: int | None, seed: int, report: Callable[[int, int], None]
) -> list[LayerCheck]:
    """Both halves of every layer named, `tokens` random hidden states each: as many as a page has, unless told.

    Raises:
        UsageError: a layer that the checkpoint does not have, or more tokens than a page.
        AngelForgeError: the checkpoint is damaged, or the temporary folder's disk too small.
    """
    checkpoint = Checkpoint.open(str(folder))
    config = checkpoint.config
    if max(layers) >= config.num_hidden_layers:
        raise UsageError(
            f"--layers names layer {max(layers)}, but the checkpoint has layers 0 to {config.num_hidden_layers - 1}."
        )
    precision = natural_precision(config)
    most = min(PAGE_SIZE, config.max_context)
    if tokens is not None and tokens > most:
        raise UsageError(f"--length is {tokens}, but layers of a checkpoint are run on at most {most} states, a page.")
    tokens = tokens or most
    judge = prepare_judge(build_graph(config, precision, PAGE_SIZE, tokens))
    given = checkpoint_config(checkpoint.folder), checkpoint_tensors(checkpoint.folder)
    reference = reference_like(precision, *given, keep=0)
    checks: list[LayerCheck] = []
    for done, layer in enumerate(layers):
        with TemporaryDirectory(prefix="angelforge-layer-") as scratch:
            _pack_layer(checkpoint, config, precision, layer, tokens, judge.model, Path(scratch))
            root = Path(scratch)
            sides = Halves(config, judge, root, reference, precision.quantized, PAGE_SIZE, tokens, seed)
            checks += sides.layer(layer)
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
