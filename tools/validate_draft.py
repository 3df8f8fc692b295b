"""`angelforge validate BUNDLE --draft`: the engine of the bundle's draft, operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from angelforge.bundle import Bundle
from angelforge.engines.cpu import open_draft_engine
from angelforge.errors import UsageError
from angelforge.runtime.validate.draft_sides import compare_draft, draft_reference_for
from angelforge.runtime.validate.engine_graph import EngineGraph
from angelforge.runtime.validate.operations import judge_graph
from angelforge.runtime.validate.results import Validation
from angelforge.runtime.validate.thresholds import thresholds
from angelforge.runtime.validate.walk import compare_walk
from angelforge.tools.validate_data import DataOptions, make_schedule


def run_draft(
    subject: Path, engine: str, reference: str | None, data: DataOptions, report: Callable[[int, int], None]
) -> Validation:
    """The draft's CPU engine on random states of the target, each operator with the judge's inputs.

    With a `reference`, "numpy:DRAFT", the graphs too: what the target hands over, and a step on it.

    Raises:
        UsageError: the bundle has no draft, another engine is asked for, or the reference is none of this draft.
        AngelForgeError: a side cannot be loaded or run.
    """
    bundle = Bundle.open(subject)
    bundle.require_weights()
    config = bundle.manifest.draft
    if config is None:
        raise UsageError(f"The bundle {subject} has no draft. Export it with --draft DIR.")
    if engine != "cpu":
        raise UsageError(f"--engine is {engine!r}, but of drafts only the engine cpu can be taken apart.")
    checkpoint = None if reference is None else _checkpoint(reference)
    compared = None if checkpoint is None else draft_reference_for(checkpoint, bundle)
    planned, told = make_schedule(bundle, data)
    rng = np.random.default_rng(data.seed)
    sizes = [len(step.batch.input_ids) for step in planned.steps]
    states = [{"hidden": rng.standard_normal((size, config.hidden_size)).astype(np.float32)} for size in sizes]
    judge = judge_graph(bundle, role="draft")
    candidate = EngineGraph(ir.from_proto(onnx.ModelProto.FromString(open_draft_engine(bundle))), bundle.folder, judge)
    precision = bundle.manifest.precision
    limits = thresholds(precision, as_stored=False)
    found = compare_walk(judge, candidate, bundle, planned, limits, by_layer=False, more=states, report=report)
    beside = [] if compared is None else compare_draft(bundle, compared, planned, limits, report)
    return Validation(
        str(subject),
        precision.value,
        engine,
        told,
        limits,
        operators=tuple(found),
        halves=tuple(beside),
        checkpoint=None if checkpoint is None else str(checkpoint),
        draft=True,
    )


def _checkpoint(reference: str) -> Path:
    kind, _, folder = reference.partition(":")
    if kind != "numpy" or not folder:
        raise UsageError(f"--reference is {reference!r}, but of drafts there is numpy:DRAFT_CHECKPOINT alone.")
    return Path(folder)
