"""A step launched kernel by kernel computes what the graph says: each call its function body, the whole its judge."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import onnx_ir as ir
import pytest
import torch

from angelforge.bundle import Bundle
from angelforge.errors import AngelForgeError
from angelforge.exporter.export import ExportOptions, export
from angelforge.plugins import run_kernel
from angelforge.plugins.device.interpreted import exact_numbers
from angelforge.plugins.kernel import Gpu
from angelforge.plugins.registry import OPERATORS
from angelforge.precision import Precision
from angelforge.runtime.batch import INPUTS
from angelforge.runtime.validate.metrics import difference, logit_rows
from angelforge.runtime.validate.runners import JudgeRunner
from angelforge.runtime.validate.thresholds import thresholds
from angelforge.tools.device_step.executor import StepGraph
from angelforge.tools.device_step.measure import FirstRun, first_run
from angelforge.tools.device_step.memory import PAGE_SIZE, Subject
from angelforge.tools.device_step.model import DeviceModel
from angelforge.tools.device_step.sequences import Case, decode_batch
from angelforge.tools.kernel_bench.compare import compare
from angelforge.tools.kernel_bench.truth import by_body, to_numpy
from angelforge.tools.kernel_bench.work import Work

FEW_SMS = Gpu("sm_90", 3)
CASE = Case(2, 300)  # two parts of each sequence's keys, a last page that is not full
COSINE = (
    0.99  # found: 0.9993 in fp8; the limits of `validate` are for deep models, which amplify every step of rounding
)
PRECISIONS = [Precision.FP8, pytest.param(Precision.BF16, marks=pytest.mark.full)]


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    """Every launch with a GPU's numbers."""
    launch = run_kernel.launch

    def exact(*arguments: Any) -> None:
        with exact_numbers():
            launch(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_kernel, "launch", exact)
        yield


class Ran:
    """A bundle whose weights are the random ones, and a step on them."""

    def __init__(self, checkpoint: Path, folder: Path, precision: Precision) -> None:
        bundle = export(str(checkpoint), folder, ExportOptions(precision=precision, layers=2))
        manifest = bundle.manifest
        self.bundle = bundle
        self.model = DeviceModel(Subject(manifest.model, precision, manifest.max_context), [CASE], FEW_SMS, "cpu")
        write_weights(bundle, self.model.weights)
        self.values = self.model.values(CASE)
        self.pools_before = {name: pool.clone() for name, pool in self.model.pools.items()}
        self.first: FirstRun = first_run(self.model, self.values, keep=True)


def write_weights(bundle: Bundle, weights: dict[str, torch.Tensor]) -> None:
    """Puts their bytes where the bundle's files have those of the same names."""
    assert weights.keys() == bundle.tensors.keys()
    for name, info in bundle.tensors.items():
        data = weights[name].contiguous().view(torch.uint8).numpy().tobytes()
        assert len(data) == info.nbytes
        with info.path.open("r+b") as file:
            file.seek(info.offset)
            file.write(data)


@pytest.fixture(scope="module", params=PRECISIONS, ids=lambda p: p.value)
def ran(request: pytest.FixtureRequest, small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(small_checkpoint, tmp_path_factory.mktemp("device") / "bundle", request.param)


def test_every_call_agrees_with_its_body(ran: Ran) -> None:
    """On the inputs that it had in the step, within the limits of `bench kernels`."""
    compared = set()
    for call in ran.first.calls:
        if call.operator in OPERATORS and call.launch is not None:
            work = Work(OPERATORS[call.operator], "", {}, call.attributes)
            verdict = compare(work.operator, call.inputs, call.attributes, call.outputs, by_body(work, call.inputs))
            assert verdict.ok, (call.operator, call.layer, verdict)
            compared.add(call.operator)
    nodes = {node.op_type for node in ir.load(ran.bundle.folder / "model.onnx").graph}
    assert compared == nodes - {"AllReduce", "Gather"}


def test_the_step_agrees_with_the_judge(ran: Ran) -> None:
    """Logits and pools of ONNX Runtime on the bundle's graph, the same weights, tokens and cache."""
    limits = thresholds(ran.bundle.manifest.precision, as_stored=True)
    batch = decode_batch(ran.model.subject.config, CASE, PAGE_SIZE, ran.model.subject.seed)
    feed = {name: getattr(batch, name) for name in INPUTS}
    feed |= {name: to_numpy(pool.float()) for name, pool in ran.pools_before.items()}
    judge = JudgeRunner(ran.bundle, len(ran.pools_before["kv_cache.0"]), own_pool=False, as_stored=True)
    with judge:
        outputs = judge.infer(feed)
    logits = to_numpy(ran.first.logits)
    assert difference(logits, outputs["logits"]).cosine >= COSINE
    rows = logit_rows(logits, outputs["logits"], tuple((i, CASE.context - 1) for i in range(CASE.batch)))
    assert np.mean([row.kl for row in rows]) <= limits.kl
    for layer in range(2):
        name, slots = f"kv_cache.{layer}", batch.slots
        wanted, found = outputs[f"kv_cache_out.{layer}"], to_numpy(ran.model.pools[name].float())
        page, offset = slots // PAGE_SIZE, slots % PAGE_SIZE
        result = difference(found[page, :, :, offset], np.asarray(wanted)[page, :, :, offset])
        assert result.relative_error <= limits.first_cache if layer == 0 else result.cosine >= COSINE
        found[page, :, :, offset] = wanted[page, :, :, offset]
        assert np.array_equal(found, wanted)  # nothing else was written


@pytest.mark.full
def test_a_step_repeats_to_the_bit(ran: Ran) -> None:
    """It writes the same keys and values again, so that replays of a captured step all do the same work."""
    assert torch.equal(ran.model.graph.run(ran.values), ran.first.logits)


def test_launches_and_experts_are_counted(ran: Ran) -> None:
    graph, calls = ran.model.graph, ran.first.calls
    assert graph.launches == sum(call.launch is not None for call in calls) == 26
    assert graph.launches_by_layer == [9, 12]
    ids = next(call.outputs[0] for call in calls if call.operator == "MoERoute")
    assert ran.first.experts == (len({e for row in ids.tolist() for e in row[:-1]}),)


def test_values_are_let_go_after_their_last_use(ran: Ran) -> None:
    """So that a step needs the memory of one layer's activations."""
    model = ran.model
    graph, held = StepGraph(dense_layer_model(model), FEW_SMS), []
    for call in graph.walk(model.values(CASE)):
        held += [ref(output) for output in call.outputs]
        last = call.outputs[0]
    del call
    alive = [tensor for tensor in (reference() for reference in held) if tensor is not None]
    assert {id(tensor) for tensor in alive} == {id(last), id(model.pools["kv_cache.0"])}


def dense_layer_model(model: DeviceModel) -> ir.Model:
    from angelforge.exporter.graph import build_graph

    subject = model.subject
    return build_graph(subject.config.with_layers(1), subject.precision, PAGE_SIZE, subject.max_context)


def test_nodes_without_an_implementation_are_refused_by_name(ran: Ran) -> None:
    graph = dense_layer_model(ran.model).graph
    graph.append(ir.node("Softmax", [graph.outputs[0]], name="last"))
    with pytest.raises(AngelForgeError, match=r"ai\.onnx\.Softmax \(last\)"):
        StepGraph(ir.Model(graph, ir_version=11), FEW_SMS)
