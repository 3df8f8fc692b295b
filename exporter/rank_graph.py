"""Adds the graph for N ranks to a bundle: from its configuration alone, its weight files stay as they are."""

import dataclasses

import onnx_ir as ir

from angelforge.atomic import lock, write_atomic
from angelforge.bundle import Bundle, record_file
from angelforge.diskerrors import explained
from angelforge.exporter.destination import LOCK
from angelforge.exporter.graph import build_graph, locate_weights, slices_to_inputs
from angelforge.exporter.placement import Location


def add_rank_graph(bundle: Bundle, ranks: int) -> Bundle:
    """The bundle with a graph `model.tpN.onnx` for `ranks` ranks; as it is where it has one, or for one rank.

    Raises:
        UsageError: the model cannot be split over so many ranks.
        AngelForgeError: the bundle is being exported, or the disk refuses.
    """
    role = f"target-tp{ranks}"
    if ranks == 1 or role in bundle.manifest.graphs:
        return bundle
    with lock(bundle.folder / LOCK):
        manifest = Bundle.open(bundle.folder).manifest  # another build may have added a graph meanwhile
        draft = manifest.draft
        with explained("read", bundle.folder / manifest.graphs["target"]):
            stored = ir.load(bundle.folder / manifest.graphs["target"]).graph.initializers
        model = build_graph(manifest.model, manifest.precision, manifest.page_size, manifest.max_context, draft, ranks)
        slices_to_inputs(model, {name: _shape(value) for name, value in stored.items()})
        locate_weights(model, {name: _location(value) for name, value in stored.items()})
        name = f"model.tp{ranks}.onnx"
        write_atomic(bundle.folder / name, ir.to_proto(model).SerializeToString(deterministic=True))
        record = {name: record_file(bundle.folder / name)}
        graphs, files = {**manifest.graphs, role: name}, {**manifest.files, **record}
        dataclasses.replace(manifest, graphs=graphs, files=files).write(bundle.folder)
        return Bundle.open(bundle.folder)


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(value.shape.numpy())


def _location(value: ir.Value) -> Location:
    tensor = value.const_value
    assert isinstance(tensor, ir.ExternalTensor)
    return Location(str(tensor.location), tensor.offset or 0, tensor.length or 0)
