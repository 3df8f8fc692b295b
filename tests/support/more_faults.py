"""More faults, each in an engine of every precision: wrong attributes, wrong wires, wrong bodies, wrong weights.

Kinds that FP8 replaces are named in both forms; a fault in a body shows in the first layer that has the operator.
"""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from support.faults import Fault, before, change_tensor, constant, function_of

Change = Callable[[ir.Model], None]
PRECISIONS = ("fp32", "bf16", "fp8")
NORMS = ("AddNorm", "AddNormQuantize")
LAYER = "model.layers.1."


def node_of(model: ir.Model, layer: int, kinds: Sequence[str], index: int = 0) -> ir.Node:
    """The node number `index` of one of these operators in a layer."""
    return [n for n in model.graph if n.op_type in kinds and f"layers.{layer}/" in (n.name or "")][index]


def attribute(kinds: Sequence[str], name: str, value: float, index: int = 0) -> Change:
    """Layer 1 has another value of an attribute."""

    def change(model: ir.Model) -> None:
        make = ir.AttrInt64 if isinstance(value, int) else ir.AttrFloat32
        node_of(model, 1, kinds, index).attributes[name] = make(name, value)

    return change


def swapped(kind: str, left: int, right: int) -> Change:
    """Two inputs of layer 1's operator change places."""

    def change(model: ir.Model) -> None:
        node = node_of(model, 1, (kind,))
        first, second = node.inputs[left], node.inputs[right]
        node.replace_input_with(left, second)
        node.replace_input_with(right, first)

    return change


def shifted(kind: str, name: str, by: int, layer: int | None = 1) -> Change:
    """An integer input is `by` more, at least 0."""

    def change(model: ir.Model) -> None:
        place = "" if layer is None else f"layers.{layer}/"
        named = [n for n in model.graph if n.op_type == kind and place in (n.name or "")]
        node = next(n for n in named if name in {v.name for v in n.inputs if v is not None})
        port = [v.name for v in node.inputs if v is not None].index(name)
        source = node.inputs[port]
        assert source is not None and source.dtype is not None

        def build(value: ir.Value, add: Callable[..., ir.Value]) -> ir.Value:
            more, zero = (constant(add, np.array([n], source.dtype.numpy())) for n in (by, 0))
            return add("Max", add("Add", value, more), zero)

        before(model, node, port, build)

    return change


def doubled_residual(model: ir.Model) -> None:
    """Layer 1 adds the residual stream to itself and not attention."""
    node = node_of(model, 1, NORMS, 1)
    node.replace_input_with(1, node.inputs[0])


def norms_swapped(model: ir.Model) -> None:
    """Layer 1's two norms have each other's weight."""
    first, second = (node_of(model, 1, NORMS, index) for index in (0, 1))
    left, right = first.inputs[2], second.inputs[2]
    first.replace_input_with(2, right)
    second.replace_input_with(2, left)


def shared_left_out(model: ir.Model) -> None:
    """Routed experts are added to themselves, and the shared one is not."""
    add = next(node for node in function_of(model, "MoECombine") if node.op_type == "Add")
    add.replace_input_with(1, add.inputs[0])


def tanh_for_sigmoid(model: ir.Model) -> None:
    """Experts gate with x · tanh(x)."""
    kinds = {node.op_type for node in model.graph}
    function = function_of(model, "MoEGateUp" if "MoEGateUp" in kinds else "Fp8MoEGateUp")
    graphs: list[ir.Graph | ir.Function] = [function]
    while graphs:
        for node in graphs.pop():
            if node.op_type == "Sigmoid":
                node.op_type = "Tanh"
            graphs += [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]


def weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> dict[str, Callable[..., None]]:
    """A weight that the engine reads is another one."""
    return {"weights": lambda bundle, root: change_tensor(bundle, root, name, change)}


def one_negated(array: np.ndarray) -> np.ndarray:
    """One element in the middle has the other sign."""
    flat = array.reshape(-1).copy()
    flat[flat.size // 2 + 5] = -flat[flat.size // 2 + 5]
    return flat.reshape(array.shape)


def one_doubled(array: np.ndarray) -> np.ndarray:
    """The fourth element is twice as large."""
    flat = array.reshape(-1).copy()
    flat[3] = flat[3] * 2
    return flat.reshape(array.shape)


def experts_swapped(array: np.ndarray) -> np.ndarray:
    """Experts 1 and 2 change places."""
    return array[[0, 2, 1, *range(3, len(array))]]


_EVERYWHERE = [
    ("another epsilon", "layer 1", NORMS, {"graph": attribute(NORMS, "epsilon", 1e-3, 1)}),
    (
        "scores over the head's size",
        "layer 1",
        ("PagedAttention",),
        {"graph": attribute(("PagedAttention",), "scale", 1 / 32)},
    ),
    ("experts not scaled", "layer 1", ("MoERoute",), {"graph": attribute(("MoERoute",), "routed_scaling_factor", 1.0)}),
    ("a group too many", "layer 1", ("MoERoute",), {"graph": attribute(("MoERoute",), "topk_group", 3)}),
    (
        "the shared expert left out",
        "layer 1",
        ("MoECombine",),
        {"graph": shared_left_out},
    ),
    ("norms of query and key swapped", "layer 1", ("QKVPrepare",), {"graph": swapped("QKVPrepare", 1, 2)}),
    ("cos and sin swapped", "layer 1", ("QKVPrepare",), {"graph": swapped("QKVPrepare", 3, 4)}),
    ("written one slot before", "layer 1", ("QKVPrepare",), {"graph": shifted("QKVPrepare", "slots", -1)}),
    ("rotated one position further", "layer 1", ("QKVPrepare",), {"graph": shifted("QKVPrepare", "positions", 1)}),
    (
        "the last token not in the cache",
        "layer 1",
        ("PagedAttention",),
        {"graph": shifted("PagedAttention", "kv_length", -1)},
    ),
    ("the residual added to itself", "layer 1", NORMS, {"graph": doubled_residual}),
    ("the two norms swapped", "layer 1", NORMS, {"graph": norms_swapped}),
    ("tanh for sigmoid", "layer 1", ("MoEGateUp", "Fp8MoEGateUp"), {"graph": tanh_for_sigmoid}),
    ("logits of the row before", "head", ("Gather",), {"graph": shifted("Gather", "logit_indices", -1, None)}),
    ("the id before", "word_embeddings", ("Embedding",), {"graph": shifted("Embedding", "input_ids", -1, None)}),
    (
        "one value of an expert negated",
        "layer 1",
        ("MoEDown", "Fp8MoEDown"),
        weight(LAYER + "mlp.experts.down_proj.weight", one_negated),
    ),
    (
        "two experts swapped",
        "layer 1",
        ("MoEDown", "Fp8MoEDown"),
        weight(LAYER + "mlp.experts.down_proj.weight", experts_swapped),
    ),
    ("one value of the router doubled", "layer 1", ("MoELogits",), weight(LAYER + "mlp.gate.weight", one_doubled)),
    (
        "one value of a key's norm doubled",
        "layer 1",
        ("QKVPrepare",),
        weight(LAYER + "attention.key_layernorm.weight", one_doubled),
    ),
    ("one value of the last norm doubled", "head", ("AddNorm",), weight("model.norm.weight", one_doubled)),
]
_SCALE = weight(LAYER + "mlp.experts.up_proj.weight_scale_inv", one_doubled)

MORE_FAULTS = [
    *(
        Fault(name, kind, place, operators[-1 if kind == "fp8" else 0], **how)
        for name, place, operators, how in _EVERYWHERE
        for kind in PRECISIONS
    ),
    Fault("one block scale doubled", "fp8", "layer 1", "Fp8MoEGateUp", **_SCALE),
]
