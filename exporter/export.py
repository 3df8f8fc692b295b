"""From a checkpoint to a bundle: graph, weights, tokenizer files, and the manifest that makes them one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile

import onnx_ir as ir

from angelforge import __version__
from angelforge.atomic import atomic_file, lock, write_atomic
from angelforge.bundle import Bundle, FileRecord, Manifest, record_file
from angelforge.checkpoint import Checkpoint
from angelforge.config import ModelConfig
from angelforge.diskerrors import explained
from angelforge.errors import UsageError
from angelforge.exporter.context import context_limit
from angelforge.exporter.graph import build_graph, locate_weights
from angelforge.exporter.layout import Shard, bundle_tensors, locate, plan_shards
from angelforge.exporter.packer import Progress, pack, remove_stale
from angelforge.hub import CONFIG_FILES
from angelforge.hub import locate as find_source
from angelforge.plugins.operator import DOMAIN
from angelforge.plugins.registry import OPERATORS
from angelforge.precision import Precision, natural_precision

PAGE_SIZE = 64  # tokens of a page of the KV pool
GRAPH = "model.onnx"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class ExportOptions:
    """What of a checkpoint goes into a bundle, and how."""

    precision: Precision | None = None  # the checkpoint's own
    rope_scaling: str | None = None  # "yarn:4"
    max_context: int | None = None  # positions; all that the model covers
    layers: int | None = None  # only the first ones
    graph_only: bool = False  # no weights: from config.json alone


def export(source: str, folder: Path, options: ExportOptions, progress: Progress | None = None) -> Bundle:
    """Exports a checkpoint (a folder or a Hub id) to the bundle `folder` and returns it, opened.

    The same call after an interrupted one goes on where that was. `progress` hears of packed bytes.

    Raises:
        AngelForgeError: the checkpoint is damaged or not of this architecture, or the disk refuses.
        UsageError: the options contradict the checkpoint.
    """
    checkpoint = None if options.graph_only else Checkpoint.open(source, options.layers)
    if checkpoint is None:
        origin = find_source(source, (*CONFIG_FILES, *TOKENIZER_FILES))
        config = ModelConfig.load(origin)
        config = config if options.layers is None else config.with_layers(options.layers)
    else:
        checkpoint.check()
        origin, config = checkpoint.folder, checkpoint.config
    if options.rope_scaling is not None:
        config = config.with_rope_scaling(options.rope_scaling)
    _check_supported(config)
    precision = options.precision or natural_precision(config)
    max_context = context_limit(config, options.max_context)
    tensors = bundle_tensors(config, precision, max_context)
    shards = plan_shards(tensors)
    model = build_graph(config, precision, PAGE_SIZE, max_context)
    locate_weights(model, locate(tensors, shards))

    with explained("create", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".export.lock"):
        write_atomic(folder / GRAPH, ir.to_proto(model).SerializeToString(deterministic=True))
        files = {name: record_file(folder / name) for name in (GRAPH, *_copy_tokenizer(origin, folder))}
        files |= _pack(checkpoint, shards, folder, progress)
        Manifest(
            producer=f"angelforge {__version__}",
            model=config,
            precision=precision,
            page_size=PAGE_SIZE,
            max_context=max_context,
            operators=_operators_used(model),
            graphs={"target": GRAPH},
            weights="absent" if checkpoint is None else "packed",
            files=files,
        ).write(folder)
        remove_stale(folder, [shard.file for shard in shards])
        return Bundle.open(folder)


def _check_supported(config: ModelConfig) -> None:
    if not config.use_qk_norm:
        raise UsageError("The checkpoint has use_qk_norm false; only models with QK-norm can be exported.")


def _operators_used(model: ir.Model) -> dict[str, int]:
    return {node.op_type: OPERATORS[node.op_type].version for node in model.graph if node.domain == DOMAIN}


def _copy_tokenizer(origin: Path, folder: Path) -> list[str]:
    names = [name for name in TOKENIZER_FILES if (origin / name).is_file()]
    for name in names:
        with explained("copy", origin / name), atomic_file(folder / name) as temporary:
            copyfile(origin / name, temporary)
    return names


def _pack(
    checkpoint: Checkpoint | None, shards: Sequence[Shard], folder: Path, progress: Progress | None
) -> dict[str, FileRecord]:
    if checkpoint is None:
        return {}
    packed = pack(checkpoint, shards, folder, progress)
    return {shard.file: FileRecord(shard.size, shard.sha256, shard.header_sha256) for shard in packed}
