"""Faults planted in an engine under test: in its graph, in the weights that it reads, or in a kernel."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from angelforge.bundle import Bundle
from angelforge.engines.manifest import DRAFT_FILE, FILE, engine_folder
from angelforge.engines.onnxruntime_graph import optimize
from angelforge.engines.widen import widen_activations
from angelforge.plugins.operator import DOMAIN
from angelforge.tensorfile import read_tensor

INT32, INT64, FLOAT = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT


@dataclass(frozen=True)
class Fault:
    """What is wrong, in which bundle, and where a report must find it."""

    name: str
    bundle: str  # "fp32" or "fp8"
    place: str
    operator: str
    graph: Callable[[ir.Model], None] | None = None
    weights: Callable[[Bundle, Path], None] | None = None  # changes files of a copy


def faulty_engine(bundle: Bundle, fault: Fault, folder: Path) -> tuple[ir.Model, Path]:
    """The engine's graph as a build with the fault would write it, and the folder of the weights that it reads."""
    root = bundle.folder
    if fault.weights is not None:
        root = folder / "weights-of-the-engine"
        shutil.copytree(bundle.folder, root)
        fault.weights(bundle, root)
    return _built(bundle, "target", fault.graph), root


def _built(bundle: Bundle, role: str, change: Callable[[ir.Model], None] | None) -> ir.Model:
    model = ir.load(bundle.folder / bundle.manifest.graphs[role])
    if change is not None:
        change(model)
    widen_activations(model)
    return ir.from_proto(onnx.ModelProto.FromString(optimize(model)))


def break_engine(bundle: Bundle, change: Callable[[ir.Model], None], role: str = "target") -> None:
    """Puts an engine in the place of a bundle's CPU engine as a build with a bug would: graph and digest agree."""
    folder = engine_folder(bundle, "cpu")
    manifest = folder / (FILE if role == "target" else DRAFT_FILE)
    told = json.loads(manifest.read_text())
    ir.save(_built(bundle, role, change), folder / told["engine"])
    told["engine_digest"] = sha256((folder / told["engine"]).read_bytes()).hexdigest()
    manifest.write_text(json.dumps(told))


def node_of(model: ir.Model, layer: int, kind: str) -> ir.Node:
    """The first node of an operator in a layer."""
    return next(n for n in model.graph if n.op_type == kind and f"layers.{layer}/" in (n.name or ""))


def function_of(model: ir.Model, kind: str) -> ir.Function:
    """An operator's body."""
    return next(f for f in model.functions.values() if f.domain == DOMAIN and f.name == kind)


def before(model: ir.Model, node: ir.Node, port: int, build: Callable[..., ir.Value]) -> None:
    """Puts nodes between a node's input and the node; `build(value, add)` gives the new input."""
    source = node.inputs[port]
    assert source is not None
    made: list[ir.Node] = []

    def add(kind: str, *inputs: ir.Value, dtype: ir.DataType | None = None, **numbers: int) -> ir.Value:
        attributes = [ir.AttrInt64(name, value) for name, value in numbers.items()]
        new = ir.Node("", kind, list(inputs), attributes, num_outputs=1, name=f"{node.name}/fault_{port}_{len(made)}")
        new.outputs[0].name = f"fault.{node.name}.{port}.{len(made)}"
        new.outputs[0].dtype = dtype or source.dtype
        made.append(new)
        return new.outputs[0]

    result = build(source, add)
    node.replace_input_with(port, result)
    model.graph.insert_before(node, made)


def constant(add: Callable[..., ir.Value], array: np.ndarray) -> ir.Value:
    """A constant among the nodes that `before` puts in."""
    value = add("Constant", dtype=ir.DataType.from_numpy(array.dtype))
    node = value.producer()
    assert node is not None
    node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))
    return value


def change_tensor(bundle: Bundle, root: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrites a weight in the copy of the bundle below `root`."""
    info = bundle.tensors[name]
    array = np.ascontiguousarray(change(read_tensor(info)))
    with (root / info.path.relative_to(bundle.folder)).open("r+b") as file:
        file.seek(info.offset)
        file.write(array.tobytes())


def wrong_bias_sign(bundle: Bundle, root: Path) -> None:
    """Layer 1's experts are biased the other way."""
    change_tensor(bundle, root, "model.layers.1.mlp.gate.expert_bias", np.negative)


def transposed_scale(bundle: Bundle, root: Path) -> None:
    """The block scales of layer 1's attention output are transposed."""
    change_tensor(bundle, root, "model.layers.1.attention.dense.weight_scale_inv", np.transpose)


def yarn_ignored(bundle: Bundle, root: Path) -> None:
    """The tables turn as without YaRN: every angle `factor` times as fast, no attention factor."""
    config = bundle.manifest.model
    angles = np.arange(bundle.manifest.max_context)[:, None] * config.rope_theta ** (
        -2.0 * np.arange(config.rotary_dim // 2) / config.rotary_dim
    )
    change_tensor(bundle, root, "rope.cos", lambda old: np.cos(angles).astype(old.dtype))
    change_tensor(bundle, root, "rope.sin", lambda old: np.sin(angles).astype(old.dtype))


def interleaved_rotation(model: ir.Model) -> None:
    """Pairs (2i, 2i + 1) are rotated instead of (i, i + half)."""
    for node in function_of(model, "QKVPrepare"):
        if node.op_type == "RotaryEmbedding":
            node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


def mask_off_at_border(model: ir.Model) -> None:
    """In layer 2 the first token of a page does not see itself."""

    def build(positions: ir.Value, add: Callable[..., ir.Value]) -> ir.Value:
        page, zero = (constant(add, np.array([n], np.int32)) for n in (64, 0))
        first = add("Equal", add("Mod", positions, page), zero, dtype=ir.DataType.BOOL)
        back = add("Cast", first, dtype=INT32, to=int(INT32))
        one = constant(add, np.array([1], np.int32))
        return add("Max", add("Sub", positions, back), add("Sub", one, one))

    before(model, node_of(model, 2, "PagedAttention"), 5, build)


def groups_masked_with_zero(model: ir.Model) -> None:
    """Experts of dropped groups keep a score of 0."""
    for node in function_of(model, "MoERoute"):
        value = node.attributes.get("value")
        if node.op_type == "Constant" and value is not None and np.isneginf(value.as_tensor().numpy()).any():
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.float32(0)))
        number = node.attributes.get("value_float")
        if node.op_type == "Constant" and number is not None and number.value == -np.inf:
            node.attributes["value_float"] = ir.AttrFloat32("value_float", 0.0)


def swapped_gate_and_up(model: ir.Model) -> None:
    """Layer 2's experts, or the draft's MLP, gate with what should be gated."""
    drafted = [node for node in model.graph if node.op_type == "GateUp"]
    node = drafted[0] if model.graph.name == "draft" else node_of(model, 2, "MoEGateUp")
    gate, up = node.inputs[1], node.inputs[2]
    node.replace_input_with(1, up)
    node.replace_input_with(2, gate)


def tf32_router(model: ir.Model) -> None:
    """Layer 1's router multiplies values of 11 significant bits, as tensor cores do with TF32."""

    def build(hidden: ir.Value, add: Callable[..., ir.Value]) -> ir.Value:
        # Veltkamp's splitting: hidden · (2^13 + 1) − (hidden · (2^13 + 1) − hidden) has the upper 11 bits.
        scaled = add("Mul", hidden, constant(add, np.array(8193, np.float32)))
        return add("Sub", scaled, add("Sub", scaled, hidden))

    node = node_of(model, 1, "MoELogits")
    before(model, node, 0, build)
    before(model, node, 1, build)


def routed_padding(model: ir.Model) -> None:
    """Layer 1's router takes all rows for tokens."""
    logits = node_of(model, 1, "MoERoute").inputs[0]

    def build(count: ir.Value, add: Callable[..., ir.Value]) -> ir.Value:
        assert logits is not None
        return add("Cast", add("Shape", logits, dtype=INT64, end=1), dtype=INT32, to=int(INT32))

    before(model, node_of(model, 1, "MoERoute"), 2, build)


def stale_page(model: ir.Model) -> None:
    """Layer 1 reads the page before a sequence's second one, as from a table of an earlier step."""

    def build(table: ir.Value, add: Callable[..., ir.Value]) -> ir.Value:
        first = constant(add, np.array([0], np.int64))
        shape = add("Shape", table, dtype=INT64)
        return add("Expand", add("Gather", table, first, axis=1), shape)

    before(model, node_of(model, 1, "PagedAttention"), 2, build)


def _norms(model: ir.Model, layer: int) -> list[ir.Node]:
    """The two norms of a layer."""
    kinds = ("AddNorm", "AddNormQuantize")
    return [n for n in model.graph if n.op_type in kinds and f"layers.{layer}/" in (n.name or "")]


def attention_not_added(model: ir.Model) -> None:
    """Layer 1 adds the MLP of layer 0 a second time in place of its attention."""
    before, after = _norms(model, 1)
    after.replace_input_with(1, before.inputs[1])


def skipped_residual(model: ir.Model) -> None:
    """Layer 1's attention is added to the residual stream of layer 0."""
    _norms(model, 1)[1].replace_input_with(0, _norms(model, 0)[0].outputs[0])


def cache_of_another_layer(model: ir.Model) -> None:
    """Layer 1 attends to the keys and values of layer 0."""
    node_of(model, 1, "PagedAttention").replace_input_with(1, node_of(model, 0, "PagedAttention").inputs[1])


def experts_from_the_wrong_norm(model: ir.Model) -> None:
    """Layer 1's experts take what its attention took."""
    before = _norms(model, 1)[0]
    quantized = before.op_type == "AddNormQuantize"
    node = node_of(model, 1, "Fp8MoEGateUp" if quantized else "MoEGateUp")
    for port in range(2 if quantized else 1):
        node.replace_input_with(port, before.outputs[port + (2 if quantized else 1)])


FAULTS = [
    Fault("a wrong expert bias sign", "fp32", "layer 1", "MoERoute", weights=wrong_bias_sign),
    Fault("a transposed block scale", "fp8", "layer 1", "Fp8Linear (dense)", weights=transposed_scale),
    Fault("rotary pairs interleaved", "fp32", "layer 0", "QKVPrepare", graph=interleaved_rotation),
    Fault("mask off by one at a page border", "fp32", "layer 2", "PagedAttention", graph=mask_off_at_border),
    Fault("groups masked with 0", "fp32", "layer 1", "MoERoute", graph=groups_masked_with_zero),
    Fault("gate and up swapped", "fp32", "layer 2", "MoEGateUp", graph=swapped_gate_and_up),
    Fault("YaRN's factor ignored", "fp32", "layer 0", "QKVPrepare", weights=yarn_ignored),
    Fault("TF32 in the router", "fp32", "layer 1", "MoELogits", graph=tf32_router),
    Fault("a padding row that routes", "fp32", "layer 1", "MoERoute", graph=routed_padding),
    Fault("a stale page", "fp32", "layer 1", "PagedAttention", graph=stale_page),
    *(
        Fault(name, kind, "layer 1", operator[kind == "fp8"], graph=graph)
        for kind in ("fp32", "fp8")
        for name, operator, graph in (
            ("attention not added", ("AddNorm", "AddNormQuantize"), attention_not_added),
            ("the residual of another layer", ("AddNorm", "AddNormQuantize"), skipped_residual),
            ("the cache of another layer", ("PagedAttention", "PagedAttention"), cache_of_another_layer),
            ("experts behind the wrong norm", ("MoEGateUp", "Fp8MoEGateUp"), experts_from_the_wrong_norm),
        )
    ),
]
