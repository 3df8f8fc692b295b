"""The ONNX graph of a model: built from its config alone, weights by reference to the bundle's files."""

from collections.abc import Mapping

import onnx_ir as ir
from onnxscript import GraphBuilder

from angelforge import __version__
from angelforge.config import ModelConfig
from angelforge.draft_config import DraftConfig
from angelforge.exporter.draft import DraftLM
from angelforge.exporter.model import CausalLM
from angelforge.exporter.parts import onnx_type
from angelforge.exporter.placement import Location
from angelforge.exporter.step import Step
from angelforge.plugins.operator import DOMAIN, DOMAIN_VERSION, IR_VERSION, OPSET, WEIGHT
from angelforge.plugins.registry import functions_used
from angelforge.precision import Precision
from angelforge.ranks import rank_config


def build_graph(
    config: ModelConfig,
    precision: Precision,
    page_size: int,
    max_context: int,
    draft: DraftConfig | None = None,
    ranks: int = 1,
) -> ir.Model:
    """The model's graph with function bodies; initializers have names, types and shapes but no data yet.

    With a `draft` there is an output more, `draft_hidden` [T, hidden]: what the draft's graph takes as `hidden`. With
    `ranks` it is the graph of one rank's part, the same for all of them, with an input more, `rank` int64 [1].

    Raises:
        UsageError: the model cannot be split over so many ranks.
    """
    part = rank_config(config, precision, ranks)
    builder = _builder("model")
    step = Step.inputs(builder, ranks)
    pool_shape = ["pages", 2, part.num_key_value_heads, page_size, part.head_dim]
    pool_type = onnx_type(precision.activation)
    pools = [builder.input(f"kv_cache.{i}", pool_type, pool_shape) for i in range(part.num_hidden_layers)]
    model = CausalLM(part, precision, max_context, draft, ranks)
    logits, written, hidden = model(builder.op, step, pools)
    builder.add_output(logits, "logits")
    if hidden is not None:
        builder.add_output(hidden, "draft_hidden")
    for i, pool in enumerate(written):
        builder.add_output(pool, f"kv_cache_out.{i}")
    return _model(builder)


def build_draft_graph(
    draft: DraftConfig, target: ModelConfig, precision: Precision, page_size: int, max_context: int
) -> ir.Model:
    """The graph of one step of `draft` in a bundle of `precision`, in the one form that DESIGN.md fixes.

    Beside `logits` f32 [R, draft vocabulary] and `hidden_out` [R, hidden] it gives `target_ids` int64 [R], the
    likeliest token of each row as the target names it: `d2t` is applied where the logits are.
    """
    dtype = onnx_type(precision.activation)
    builder = _builder("draft")
    step = Step.inputs(builder)
    hidden = builder.input("hidden", dtype, ["T", draft.hidden_size])
    pool = builder.input("kv_cache.0", dtype, ["pages", 2, draft.num_key_value_heads, page_size, draft.head_dim])
    outputs = DraftLM(draft, target, precision, max_context)(builder.op, step, hidden, pool)
    for value, name in zip(outputs, ("logits", "target_ids", "hidden_out", "kv_cache_out.0"), strict=True):
        builder.add_output(value, name)
    return _model(builder)


def _builder(name: str) -> GraphBuilder:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, DOMAIN: DOMAIN_VERSION}, name=name)
    return GraphBuilder(graph)


def _model(builder: GraphBuilder) -> ir.Model:
    graph: ir.Graph = builder.graph
    return ir.Model(
        graph,
        ir_version=IR_VERSION,
        producer_name="angelforge",
        producer_version=__version__,
        functions=functions_used(graph),
    )


def slices_to_inputs(model: ir.Model, whole: Mapping[str, tuple[int, ...]]) -> None:
    """Turns the weights of which a rank holds a part into inputs, marked by `WEIGHT`; `whole` are the stored shapes.

    No bytes of the weight files are such a part for every rank, so the graph names none.
    """
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        assert value.shape is not None
        if tuple(value.shape.numpy()) != whole[name]:
            del graph.initializers[name]
            value.metadata_props[WEIGHT] = "slice"
            graph.inputs.append(value)


def locate_weights(model: ir.Model, locations: Mapping[str, Location]) -> None:
    """Points every initializer at its bytes in the bundle's weight files.

    Raises:
        KeyError: a weight of the graph has no place in the files (a programming error).
    """
    for name, value in model.graph.initializers.items():
        place = locations[name]
        assert value.dtype is not None and value.shape is not None
        value.const_value = ir.ExternalTensor(
            place.file, place.offset, place.length, value.dtype, shape=value.shape, name=name
        )
