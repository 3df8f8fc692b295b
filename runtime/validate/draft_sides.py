"""A bundle's draft beside the independent NumPy draft, both given the same states and tokens.

What the target's graph hands over is made anew of the judge's own residual streams, so that a wrong layer or `fc` is
seen whatever the precision; one step of the draft's graph is then run on what was handed over. Nothing spreads from the
one to the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from angelforge.bundle import Bundle
from angelforge.draft_config import DraftConfig
from angelforge.errors import AngelForgeError, UsageError
from angelforge.runtime.batch import INPUTS
from angelforge.runtime.draft_vocabulary import read_vocabulary
from angelforge.runtime.validate.compare import Finding
from angelforge.runtime.validate.cutting import Array, OrtPiece, Values, cut
from angelforge.runtime.validate.data import Schedule, schedule
from angelforge.runtime.validate.draft_reference import DraftReference, DraftStep
from angelforge.runtime.validate.fp8_draft_reference import Fp8DraftReference
from angelforge.runtime.validate.halves import FP8_EXACT
from angelforge.runtime.validate.metrics import difference
from angelforge.runtime.validate.operations import Stage, judge_graph
from angelforge.runtime.validate.plain_checkpoint import as_packed, checkpoint_config, checkpoint_tensors
from angelforge.runtime.validate.runners import written
from angelforge.runtime.validate.thresholds import F32, Thresholds
from angelforge.runtime.validate.walk import pool_shape, walk
from angelforge.tensorfile import read_tensor

_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "draft_vocab_size")
RUN = 2  # tokens of a short sequence
BLOCK = 1024  # such tokens that the reference takes at once
TOUCHED = 0.25  # of their tokens, that a step of e4m3 may touch; 0.08 were seen; in wide drafts more:
STEPS = 8e-5  # for each e4m3 value that a token reads; 5e-5 were seen. A wrong weight touches all of them.
KEYS_VALUES = "keys and values"
_STEP = {  # what a step gives, and what made it; in the order of the graph
    KEYS_VALUES: "norms, k and v projections, rotation",
    "hidden_out": "attention and MLP",
    "logits": "norm and Linear (lm_head)",
}


def draft_reference_for(folder: Path, bundle: Bundle) -> DraftReference:
    """The NumPy draft of a draft's checkpoint, in f64, rounded and quantised as the bundle stores it.

    The embedding is the bundle's own: it is the target's, whose reference checks it.

    Raises:
        UsageError: the folder holds no checkpoint, or another draft's.
        AngelForgeError: the checkpoint is damaged.
    """
    draft = bundle.manifest.draft
    if draft is None:
        raise UsageError(f"The bundle {bundle.folder} has no draft. Export it with --draft DIR.")
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json; the reference needs the draft's checkpoint folder.")
    config = checkpoint_config(folder)
    sizes = {
        "draft_vocab_size": bundle.manifest.model.vocab_size,
        "num_key_value_heads": config.get("num_attention_heads"),
        **{name: value for name, value in config.items() if value is not None},
    }
    for name in _SIZES:
        if sizes.get(name) != getattr(draft, name):
            raise UsageError(
                f"The reference's checkpoint {folder} has {name} {sizes.get(name)}, but the bundle's draft has "
                f"{getattr(draft, name)}. Name the checkpoint of the draft that the bundle was exported with."
            )
    tensors = checkpoint_tensors(folder)
    precision = bundle.manifest.precision
    given = as_packed(tensors, draft.quantization is not None) if precision.value != "fp32" else tensors
    kind = DraftReference if draft.quantization is None else Fp8DraftReference
    embedding = read_tensor(bundle.tensors["model.word_embeddings.weight"])
    return kind(config, lambda name: tensors(name) if name == "d2t" else given(name), embedding)


def compare_draft(
    bundle: Bundle,
    reference: DraftReference,
    planned: Schedule,
    limits: Thresholds,
    report: Callable[[int, int], None],
) -> list[Finding]:
    """Vocabulary, captured states, and what one step over all sequences gives, in the order of the graph.

    Raises:
        AngelForgeError: ONNX Runtime cannot run a graph, or the reference's checkpoint is damaged.
    """
    assert bundle.manifest.draft is not None
    sides = _Sides(bundle, bundle.manifest.draft, reference, planned, limits)
    states, captured = sides.captured(report)
    return [sides.vocabulary(), *captured, *sides.steps(states)]


@dataclass(frozen=True, eq=False)
class _Sides:
    bundle: Bundle
    draft: DraftConfig
    reference: DraftReference
    schedule: Schedule
    limits: Thresholds

    def vocabulary(self) -> Finding:
        """The target's ids of the draft's tokens; they are the same or not."""
        found, expected = read_vocabulary(self.bundle, self.draft), self.reference.target_ids()
        result = difference(found, expected)
        return Finding("draft", "the target's ids of its tokens", "d2t", 0, result, 0.0, bool(result.max_error == 0))

    def captured(self, report: Callable[[int, int], None]) -> tuple[list[Array], list[Finding]]:
        """(What the target's graph hands over in every call [T, H], the same beside the reference's `fc`)."""
        judge = judge_graph(self.bundle)
        layers = self.reference.captured_layers(self.bundle.manifest.model.num_hidden_layers)
        streams: list[dict[int, Array]] = [{} for _ in self.schedule.steps]
        states: list[Array] = []
        for seen in walk(judge, self.bundle, self.schedule):
            if seen.stage.layer in layers:
                streams[seen.step][seen.stage.layer] = _stream_after(seen.stage, seen.values)
            if "draft_hidden" in seen.stage.outputs:
                states.append(np.array(seen.values["draft_hidden"], np.float32))
            report(judge.stages.index(seen.stage) + 1, len(judge.stages))
            if len(states) == len(streams):
                break  # the target's head is not needed
        findings = []
        for number, (step, found) in enumerate(zip(self.schedule.steps, states, strict=True)):
            missing = [layer for layer in layers if layer not in streams[number]]
            if missing:
                raise AngelForgeError(f"The reference's draft takes the states of layer {missing[0]}, which is none.")
            expected = self.reference.project([streams[number][layer] for layer in layers])
            rows = len(step.rows)
            result = difference(found[:rows], expected[:rows])
            limit = self.limits.operator
            told = "captured states", "Linear (fc)", "draft_hidden", number
            findings.append(Finding(*told, result, limit, result.relative_error <= limit))
        return states, findings

    def steps(self, states: list[Array]) -> Iterator[Finding]:
        """Keys and values, states and logits, given what the target handed over; in FP8 of short sequences, too."""
        rows = [row for step in self.schedule.steps for row in step.rows]
        handed = np.concatenate([s[: len(step.rows)] for s, step in zip(states, self.schedule.steps, strict=True)])
        order = np.array(sorted(range(len(rows)), key=rows.__getitem__))  # by sequence and position
        ends = np.cumsum([len(ids) for ids in self.schedule.sequences])[:-1]
        parts = np.split(handed[order], ends)
        quantized = self.draft.quantization is not None
        limit = self.limits.first_cache if quantized else F32.operator
        if quantized:  # first, because they tell best where an error arises
            yield from self._short(parts, limit)
        made = [self.reference.step(ids, p, 0) for ids, p in zip(self.schedule.sequences, parts, strict=True)]
        for tensor, calls in self._compared(self.schedule, parts, list(map(_tensors, made))).items():
            for number, (found, expected) in enumerate(calls):
                result = difference(found, expected)
                ok = result.relative_error <= limit
                yield Finding("draft", _STEP[tensor], tensor, number, result, limit, ok)

    def _short(self, parts: list[Array], limit: float) -> Iterator[Finding]:
        """The same tokens in sequences of `RUN`: there a step of e4m3 does not spread, and most must be exact."""
        manifest, draft = self.bundle.manifest, self.draft
        runs = [ids[i : i + RUN] for ids in self.schedule.sequences for i in range(0, len(ids), RUN)]
        planned = schedule(
            runs, page_size=manifest.page_size, vocab_size=manifest.model.vocab_size, max_context=manifest.max_context
        )
        states = [part[i : i + RUN] for part in parts for i in range(0, len(part), RUN)]
        expected: list[dict[str, Array]] = []
        for begin in range(0, len(runs), BLOCK // RUN):
            few = runs[begin : begin + BLOCK // RUN]
            whose = np.repeat(np.arange(len(few)), [len(ids) for ids in few])
            handed = np.concatenate(states[begin : begin + len(few)])
            made = _tensors(self.reference.apart(np.concatenate(few), handed, whose))
            expected += [{tensor: rows[whose == run] for tensor, rows in made.items()} for run in range(len(few))]
        width = draft.num_attention_heads * draft.head_dim + draft.hidden_size + draft.intermediate_size
        for tensor, calls in self._compared(planned, states, expected).items():
            found, wanted = (np.concatenate(side) for side in zip(*calls, strict=True))
            result = difference(found, wanted)
            values = 2 * draft.hidden_size if tensor == KEYS_VALUES else 2 * RUN * draft.hidden_size + width
            needed = 1 - max(TOUCHED, 1 - math.exp(-STEPS * values))
            exact = _exact_rows(found, wanted)
            ok = result.relative_error <= limit and exact >= needed
            note = f"{exact:.0%} of the tokens to {FP8_EXACT:.0e}, {needed:.0%} are needed"
            place = f"draft, {RUN} tokens a sequence"
            yield Finding(place, _STEP[tensor], tensor, 0, result, limit, ok, note)

    def _compared(
        self, planned: Schedule, states: list[Array], expected: list[dict[str, Array]]
    ) -> dict[str, list[tuple[Array, Array]]]:
        """(found, expected) of every call by tensor; `states` [n, H] of every sequence are what a step takes."""
        pairs_of: dict[str, list[tuple[Array, Array]]] = {tensor: [] for tensor in _STEP}
        for step, found in zip(planned.steps, self._graph(planned, states), strict=True):
            for tensor, calls in pairs_of.items():
                wanted = np.stack([expected[sequence][tensor][place] for sequence, place in step.rows])
                calls.append((found[tensor][: len(wanted)], wanted))
        return pairs_of

    def _graph(self, planned: Schedule, states: list[Array]) -> Iterator[dict[str, Array]]:
        judge = judge_graph(self.bundle, role="draft")
        inputs = [str(v.name) for v in judge.model.graph.inputs if not v.is_initializer()]
        names = ["logits", "hidden_out", "kv_cache_out.0"]
        piece = OrtPiece(cut(judge.model, inputs, names), self.bundle.folder)
        pool = np.zeros(pool_shape(judge, "kv_cache.0", planned.num_pages), np.float32)
        for step in planned.steps:
            feed = {name: getattr(step.batch, name) for name in INPUTS}
            hidden = np.zeros((len(step.batch.input_ids), self.draft.hidden_size), np.float32)
            hidden[: len(step.rows)] = [states[sequence][place] for sequence, place in step.rows]
            made = piece.run({**feed, "hidden": hidden, "kv_cache.0": pool})
            pool = made["kv_cache_out.0"]
            yield {**made, KEYS_VALUES: written(pool, feed)}


def _tensors(made: DraftStep) -> dict[str, Array]:
    pairs = np.stack([made.keys, made.values], axis=1)
    return {KEYS_VALUES: pairs, "hidden_out": made.hidden, "logits": made.logits}


def _stream_after(stage: Stage, values: Values) -> Array:
    """The residual stream behind a layer, f64 [T, H]: its last two outputs, that between the halves and the MLP's."""
    between, added = [values[name] for name in stage.outputs if name != stage.pool_out][-2:]
    return np.asarray(between.astype(np.float64) + added.astype(np.float64))


def _exact_rows(found: Array, expected: Array) -> float:
    rows = len(expected)
    apart = np.abs(found.astype(np.float64) - expected).reshape(rows, -1).max(axis=1)
    return float((apart <= FP8_EXACT * np.abs(expected).reshape(rows, -1).max(axis=1)).mean())
