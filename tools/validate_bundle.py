"""What `angelforge validate BUNDLE` runs, in which order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from angelforge.bundle import Bundle
from angelforge.engines.cpu import open_engine
from angelforge.errors import UsageError
from angelforge.runtime.batch import Int64
from angelforge.runtime.onnxruntime_device import cuda_providers
from angelforge.runtime.validate.compare import Finding
from angelforge.runtime.validate.cuda_graph import ProviderGraph, ProviderRunner
from angelforge.runtime.validate.data import Schedule
from angelforge.runtime.validate.engine_graph import EngineGraph
from angelforge.runtime.validate.halves import Halves
from angelforge.runtime.validate.kernel_graph import KernelGraph
from angelforge.runtime.validate.operations import JudgeGraph, judge_graph
from angelforge.runtime.validate.references import load_reference_for, numpy_reference, reference_checkpoint
from angelforge.runtime.validate.results import Validation
from angelforge.runtime.validate.runners import BundleRunner, EngineRunner, JudgeRunner, KernelRunner, ReferenceRunner
from angelforge.runtime.validate.thresholds import Thresholds, thresholds
from angelforge.runtime.validate.walk import Candidate, compare_walk
from angelforge.runtime.validate.whole import compare_whole
from angelforge.targets import get_target
from angelforge.tools.validate_data import DataOptions, make_schedule

KERNELS, CUDA = "kernels", "cuda"
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """What the command line asked for."""

    subject: Path
    engine: str
    reference: str | None
    by_layer: bool
    by_operator: bool
    layers: list[int] | None
    data: DataOptions


def run_job(job: Job, report: Report) -> Validation:
    """Compares whole models, then layers and operators where asked for, or where only they can judge or locate.

    Raises:
        UsageError: options that the bundle does not know.
        AngelForgeError: a side cannot be loaded or run.
    """
    bundle = Bundle.open(job.subject)
    bundle.require_weights()
    as_stored = not _in_f32(job.engine)
    limits = thresholds(bundle.manifest.precision, as_stored)
    planned, told = make_schedule(bundle, job.data)
    places = _places(bundle, job.layers)
    # First of all: what the user named may not exist, and what follows takes long.
    compute = None if job.reference is None else load_reference_for(job.reference, bundle)
    wholes = []
    if places is None:
        judge_runner = JudgeRunner(bundle, planned.num_pages, as_stored=as_stored)
        wholes.append(compare_whole(judge_runner, _runner(bundle, job.engine, planned), planned, limits))
    if compute is not None:
        named = ReferenceRunner(bundle, compute, f"reference: {job.reference}", planned.num_pages)
        widened = thresholds(bundle.manifest.precision, as_stored=False)
        wholes.append(compare_whole(named, JudgeRunner(bundle, planned.num_pages), planned, widened))
    engine_ok = all(whole.ok for whole in wholes if not whole.reference)
    layered: tuple[Finding, ...] = ()
    single: tuple[Finding, ...] = ()
    judge = judge_graph(bundle, as_stored)
    unjudged = limits.logits is None and not job.by_layer
    if job.by_layer or job.by_operator or unjudged or places is not None or not engine_ok:
        candidate = _candidate(bundle, job.engine, judge)
        if job.by_layer:
            layered = _walk(judge, candidate, bundle, planned, limits, True, places, report)
        if job.by_operator or unjudged or not engine_ok or not all(f.ok for f in layered) or not job.by_layer:
            single = _walk(judge, candidate, bundle, planned, limits, False, places, report)
    checkpoint = None if job.reference is None else reference_checkpoint(job.reference)
    halves: tuple[Finding, ...] = ()
    agreed = all(whole.ok for whole in wholes if whole.reference)
    if checkpoint is not None and (job.by_layer or job.by_operator or unjudged or places is not None or not agreed):
        halves = _halves(bundle, checkpoint, job, np.unique(np.concatenate(planned.sequences)))
    return Validation(
        str(job.subject),
        bundle.manifest.precision.value,
        job.engine,
        told,
        limits,
        tuple(wholes),
        layered,
        single,
        halves,
        None if checkpoint is None else str(checkpoint),
    )


def _halves(bundle: Bundle, checkpoint: Path, job: Job, ids: Int64) -> tuple[Finding, ...]:
    """The bundle's own layers beside the checkpoint that the reference is made of."""
    manifest = bundle.manifest
    tokens = min(manifest.page_size, manifest.max_context)
    reference = numpy_reference(checkpoint, bundle, keep=0)
    quantized = manifest.precision.quantized
    sides = Halves(
        manifest.model,
        judge_graph(bundle),
        bundle.folder,
        reference,
        quantized,
        manifest.page_size,
        tokens,
        job.data.seed,
        ids,
    )
    layers = range(manifest.model.num_hidden_layers) if job.layers is None else job.layers
    checks = [check for layer in layers for check in sides.layer(layer)]
    checks = [*sides.tables(), *checks]
    if job.layers is None:
        checks = [sides.embedding(), *checks, sides.head()]
    return tuple(check.finding() for check in checks)


def _walk(
    judge: JudgeGraph,
    candidate: Candidate,
    bundle: Bundle,
    planned: Schedule,
    limits: Thresholds,
    by_layer: bool,
    places: list[str] | None,
    report: Report,
) -> tuple[Finding, ...]:
    found = compare_walk(judge, candidate, bundle, planned, limits, by_layer=by_layer, places=places, report=report)
    return tuple(found)


def _runner(bundle: Bundle, engine: str, planned: Schedule) -> BundleRunner:
    if engine == KERNELS:
        return KernelRunner(bundle, planned.num_pages)
    if engine == CUDA:
        return ProviderRunner(bundle, "ONNX Runtime CUDA on the graph", cuda_providers(), planned.num_pages)
    return EngineRunner(bundle, engine, planned.num_pages)


def _candidate(bundle: Bundle, engine: str, judge: JudgeGraph) -> Candidate:
    """What can be run in pieces: the CPU engine's graph; for a GPU engine the kernels that are its operators."""
    if engine == CUDA:
        return ProviderGraph(bundle, judge, cuda_providers())
    if engine != KERNELS and _in_f32(engine):
        model = ir.from_proto(onnx.ModelProto.FromString(open_engine(bundle)))
        return EngineGraph(model, bundle.folder, judge)
    return KernelGraph(bundle)


def _in_f32(engine: str) -> bool:
    """Whether it widens bf16 and not stores it."""
    return engine == CUDA or (engine != KERNELS and get_target(engine).backend == "onnxruntime")


def _places(bundle: Bundle, layers: list[int] | None) -> list[str] | None:
    if layers is None:
        return None
    most = bundle.manifest.model.num_hidden_layers
    if any(layer >= most for layer in layers):
        raise UsageError(f"--layers names layer {max(layers)}, but the bundle has the layers 0 to {most - 1}.")
    return [f"layer {layer}" for layer in layers]
