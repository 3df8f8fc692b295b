"""A graph for several ranks as ONNX Runtime can run it: cut at every AllReduce, which the runtime does in between.

ONNX Runtime has no collective on a CPU, and custom operators would need C++. So the engine is a row of graphs; the
first output of each but the last is a partial sum, and what follows takes its sum over all ranks under the same name.
They are kept in one zip archive (stored, in their order), so that an engine stays one file with one digest.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence

import onnx
import onnx_ir as ir
from onnx import helper

from angelforge.engines.network import ALL_REDUCE
from angelforge.errors import AngelForgeError
from angelforge.plugins.operator import DOMAIN

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date of the format: the same graphs make the same bytes


def cut(model: ir.Model) -> list[ir.Model]:
    """The segments of `model`, in their order; a graph without AllReduce is one segment."""
    proto = ir.to_proto(model)
    groups: list[list[onnx.NodeProto]] = [[]]
    partials: list[str] = []
    summed: dict[str, str] = {}  # what an AllReduce makes: what it is made of
    for node in proto.graph.node:
        if node.domain == DOMAIN and node.op_type == ALL_REDUCE:
            partials.append(node.input[0])
            summed[node.output[0]] = node.input[0]
            groups.append([])
            continue
        node.input[:] = [summed.get(name, name) for name in node.input]
        groups[-1].append(node)
    graph = proto.graph
    ends = {value.name for value in graph.output}
    if last := ends & set(summed):  # an output that is a sum itself, as logits are
        groups[-1] += [helper.make_node("Identity", [summed[name]], [name]) for name in sorted(last)]
    known = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    makers = [{name for node in group for name in node.output} for group in groups]
    users = [{name for node in group for name in node.input} for group in groups]
    segments = []
    for index, group in enumerate(groups):
        later = set().union(*users[index + 1 :]) | ends
        carried = [name for name in makers[index] & later if name not in partials[index : index + 1]]
        outputs = [*partials[index : index + 1], *sorted(carried)]
        weights = [each for each in graph.initializer if each.name in users[index]]
        held = makers[index] | {each.name for each in weights} | {""}
        inputs = sorted(users[index] - held | ({partials[index - 1]} & users[index] if index else set()))
        part = helper.make_graph(
            group,
            f"segment{index}",
            [known[name] for name in inputs],
            [known[name] for name in outputs],
            weights,
        )
        whole = helper.make_model(part, functions=proto.functions, opset_imports=proto.opset_import)
        whole.ir_version = proto.ir_version
        segments.append(ir.from_proto(whole))
    return segments


def join(segments: Sequence[bytes]) -> bytes:
    """One file of serialised graphs."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for index, segment in enumerate(segments):
            archive.writestr(zipfile.ZipInfo(f"segment-{index:03d}.onnx", _EPOCH), segment)
    return file.getvalue()


def split(engine: bytes) -> list[bytes]:
    """The serialised graphs of a file that `join` made.

    Raises:
        AngelForgeError: it is not such a file.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(engine)) as archive:
            return [archive.read(name) for name in sorted(archive.namelist())]
    except (zipfile.BadZipFile, KeyError, NotImplementedError) as error:
        raise AngelForgeError(f"The engine is no archive of graphs ({error}). Build it again.") from error
