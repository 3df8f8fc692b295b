"""From a checkpoint to a bundle: graph, weights, tokenizer files, and the manifest that makes them one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import onnx_ir as ir

from angelforge import __version__
from angelforge.atomic import lock, remove_leftovers, write_atomic
from angelforge.bundle import Bundle, Manifest, record_file
from angelforge.config import ModelConfig, Quantization
from angelforge.diskerrors import explained
from angelforge.draft_config import DraftConfig
from angelforge.exporter.context import context_limit
from angelforge.exporter.destination import LOCK, check_destination, made, withdraw
from angelforge.exporter.draft_layout import draft_tensors
from angelforge.exporter.graph import build_draft_graph, build_graph, locate_weights
from angelforge.exporter.layout import bundle_tensors, locate, plan_shards
from angelforge.exporter.packer import Progress, pack, remove_stale
from angelforge.exporter.quantization_report import FILE as REPORT
from angelforge.exporter.quantization_report import write_report
from angelforge.exporter.sources import Sources
from angelforge.exporter.tokenizer_files import TOKENIZER_FILES, check_tokenizer, copy_tokenizer
from angelforge.plugins.operator import DOMAIN
from angelforge.plugins.registry import OPERATORS
from angelforge.precision import Precision, natural_precision

Config = TypeVar("Config", ModelConfig, DraftConfig)

PAGE_SIZE = 64  # tokens of a page of the KV pool
GRAPH = "model.onnx"
DRAFT_GRAPH = "draft.onnx"
RANK_GRAPHS = "model.tp*.onnx"  # written by `rank_graph.py`


@dataclass(frozen=True)
class ExportOptions:
    """What of a checkpoint goes into a bundle, and how."""

    precision: Precision | None = None  # the checkpoint's own
    rope_scaling: str | None = None  # "yarn:4"
    max_context: int | None = None  # positions; all that the model covers
    layers: int | None = None  # only the first ones
    graph_only: bool = False  # no weights: from config.json alone
    draft: str | None = None  # folder or Hub id of an EAGLE3 draft


def export(source: str, folder: Path, options: ExportOptions, progress: Progress | None = None) -> Bundle:
    """Exports a checkpoint (a folder or a Hub id) to the bundle `folder` and returns it, opened.

    The same call after an interrupted one goes on where that was; until then the folder is no bundle. `progress` hears
    of packed bytes.

    Raises:
        AngelForgeError: the checkpoint is damaged or not of this architecture, or the disk refuses.
        UsageError: the options contradict the checkpoint.
    """
    sources = Sources.open(
        source,
        options.draft,
        layers=options.layers,
        rope_scaling=options.rope_scaling,
        graph_only=options.graph_only,
        extra_files=TOKENIZER_FILES,
    )
    config, draft = sources.config, sources.draft
    precision = options.precision or natural_precision(config)
    max_context = context_limit(config, options.max_context)
    tensors = bundle_tensors(config, precision, max_context)
    graphs = {GRAPH: build_graph(config, precision, PAGE_SIZE, max_context, draft)}
    if draft is not None:
        tensors += draft_tensors(draft, precision, max_context)
        graphs[DRAFT_GRAPH] = build_draft_graph(draft, config, precision, PAGE_SIZE, max_context)
    shards = plan_shards(tensors)
    for model in graphs.values():
        locate_weights(model, locate(tensors, shards))

    check_tokenizer(sources.folder)
    check_destination(folder, options.graph_only)
    with made(folder), lock(folder / LOCK):
        remove_leftovers(folder)
        if sources.checkpoint is None:
            packed = []
            withdraw(folder)
        else:
            packed = pack(sources.checkpoint, shards, folder, progress, checked=lambda: withdraw(folder))
        _write_graphs(graphs, folder)
        files = {name: record_file(folder / name) for name in (*graphs, *copy_tokenizer(sources.folder, folder))}
        files |= {shard.file: shard.record for shard in packed}
        if write_report(folder, packed):
            files[REPORT] = record_file(folder / REPORT)
        Manifest(
            producer=f"angelforge {__version__}",
            model=_as_stored(config, precision),
            draft=None if draft is None else _as_stored(draft, precision),
            precision=precision,
            page_size=PAGE_SIZE,
            max_context=max_context,
            operators=_operators_used(graphs.values()),
            graphs={role: name for role, name in (("target", GRAPH), ("draft", DRAFT_GRAPH)) if name in graphs},
            weights="absent" if sources.checkpoint is None else "packed",
            files=files,
        ).write(folder)
        remove_stale(folder, [shard.file for shard in shards])
        return Bundle.open(folder)


def _write_graphs(graphs: Mapping[str, ir.Model], folder: Path) -> None:
    for name, model in graphs.items():
        write_atomic(folder / name, ir.to_proto(model).SerializeToString(deterministic=True))
    # Of an earlier export into this folder: a draft's graph, and graphs for several ranks, which builds make again.
    for stale in (*folder.glob(RANK_GRAPHS), *[folder / DRAFT_GRAPH] * (DRAFT_GRAPH not in graphs)):
        with explained("remove", stale):
            stale.unlink(missing_ok=True)


def _operators_used(models: Iterable[ir.Model]) -> dict[str, int]:
    nodes = (node for model in models for node in model.graph if node.domain == DOMAIN)
    return {node.op_type: OPERATORS[node.op_type].version for node in nodes}


def _as_stored(config: Config, precision: Precision) -> Config:
    """The configuration with the quantisation of the bundle's weights, whatever the checkpoint's were."""
    return replace(config, quantization=Quantization() if precision.quantized else None)
