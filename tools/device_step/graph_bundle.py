"""A bundle of a graph alone, from a configuration in memory: what an engine is built from."""

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from angelforge import __version__
from angelforge.atomic import write_atomic
from angelforge.bundle import Bundle, Manifest, record_file
from angelforge.config import Quantization
from angelforge.exporter.graph import build_graph, locate_weights
from angelforge.exporter.layout import bundle_tensors, locate, plan_shards
from angelforge.plugins.operator import DOMAIN
from angelforge.plugins.registry import OPERATORS
from angelforge.tools.device_step.memory import PAGE_SIZE, Subject

GRAPH = "model.onnx"


def write_graph_bundle(subject: Subject, folder: Path) -> Bundle:
    """Some megabytes in `folder`, which exists; a model that covers fewer positions is stretched with YaRN.

    Raises:
        AngelForgeError: the disk refuses.
        UsageError: the model has YaRN already, and it covers fewer positions.
    """
    config, precision, context = subject.config, subject.precision, subject.max_context
    if context > config.max_context:
        config = config.with_rope_scaling(f"yarn:{-(-context // config.max_position_embeddings)}")
    model = build_graph(config, precision, PAGE_SIZE, context)
    tensors = bundle_tensors(config, precision, context)
    locate_weights(model, locate(tensors, plan_shards(tensors)))
    write_atomic(folder / GRAPH, ir.to_proto(model).SerializeToString(deterministic=True))
    nodes = {node.op_type for node in model.graph if node.domain == DOMAIN}
    Manifest(
        producer=f"angelforge {__version__}",
        model=replace(config, quantization=Quantization() if precision.quantized else None),
        precision=precision,
        page_size=PAGE_SIZE,
        max_context=context,
        operators={name: OPERATORS[name].version for name in OPERATORS if name in nodes},
        graphs={"target": GRAPH},
        weights="absent",
        files={GRAPH: record_file(folder / GRAPH)},
    ).write(folder)
    return Bundle.open(folder)
