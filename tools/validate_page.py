"""The report page of a validation: verdict, first diverging tensor, plots and all tensors in one HTML file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from angelforge.atomic import write_atomic
from angelforge.diskerrors import explained
from angelforge.runtime.validate.compare import Finding
from angelforge.runtime.validate.metrics import LogitRow
from angelforge.runtime.validate.results import Validation, error_by_place, worst_by_tensor
from angelforge.runtime.validate.whole import Whole
from angelforge.tools.plots import line_plot, log_bars, share_bars

if TYPE_CHECKING:
    from angelforge.runtime.validate.study import Study
    from angelforge.tools.validate_verdict import Verdict

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1160px;margin:1.5em auto;padding:0 1em;color:#222}
h1{margin-bottom:.2em}h2{margin:1.4em 0 .4em;font-size:1.25em}h3{margin:1em 0 .2em;font-size:1em}
table{border-collapse:collapse;font-size:13px}td,th{padding:2px 14px 2px 0;text-align:left;vertical-align:top}
th{border-bottom:1px solid #999}.n{text-align:right;font-variant-numeric:tabular-nums}
.state{print-color-adjust:exact;padding:.1em .6em;border-radius:4px;color:#fff}
.state.ok{background:#0072b2}.state.failed{background:#b34e00}
tr.failed td,.first{print-color-adjust:exact}tr.failed td{background:#fdeee3;font-weight:600}
.first{border-left:5px solid #d55e00;padding:.1em 1em;background:#fdf6f0}
code{background:#f2f2f2;padding:.1em .3em}pre{background:#f6f6f6;padding:.8em;white-space:pre-wrap}
svg{display:block;width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:#333}
svg text{paint-order:stroke;stroke:#fff;stroke-width:3px;stroke-linejoin:round}
@media print{body{font-size:11px;margin:0}tr,svg,.first{break-inside:avoid}h2,h3{break-after:avoid}}
"""
_BY_POSITION = "By position: how much the distribution of the next token differs; × where the best token is another one"
_FIGURES = {
    "positions": "positions",
    "max_error": "largest difference of a logit",
    "relative_error": "the same over the largest logit",
    "cosine": "least cosine of the logits",
    "mean_kl": "mean KL, nats",
    "max_kl": "largest KL, nats",
    "top1": "same best token",
    "top5": "five best in common",
}


def write_page(path: Path, result: Validation, judged: Verdict | None) -> None:
    """Writes the page; `judged` is what a failure means. Raises AngelForgeError where the disk refuses."""
    _write(path, f"{Path(result.subject).name}: {'ok' if result.ok else 'FAILED'}", _validation(result, judged))


def write_study_page(path: Path, study: Study) -> None:
    """Writes the page of a precision study."""
    _write(path, "What the precision costs", ("<h1>What the precision costs</h1>", *_study(study)))


def _write(path: Path, title: str, parts: Iterable[str]) -> None:
    body = "\n".join(parts)
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
    with explained("write", path):
        write_atomic(path, text)


def _validation(result: Validation, judged: Verdict | None) -> Iterable[str]:
    state = "ok" if result.ok else "failed"
    name = escape(Path(result.subject).name)
    yield f'<h1>{name} <span class="state {state}">{"ok" if result.ok else "FAILED"}</span></h1>'
    yield f"<p>{escape(f'{result.precision}, engine {result.engine}; {result.data}')}</p>"
    if judged is not None:
        yield f"<p>{escape(judged.text)}</p>"
    if result.first is not None:
        yield from _first(result.first)
    if judged is not None and judged.next:
        yield f"<h3>Next</h3><pre>{escape(chr(10).join(f'{c}    # {q}' for c, q in judged.next))}</pre>"
    for title, findings in (("layer", result.layers), ("operator", result.operators)):
        if findings:
            yield f"<h2>{title.capitalize()} by {title}: largest relative error of each layer, given right inputs</h2>"
            yield log_bars(error_by_place(findings), result.limits.operator)
    for whole in result.wholes:
        yield from _whole(whole)
    tensors = worst_by_tensor((*result.layers, *result.operators, *result.halves))
    if tensors:
        yield "<h2>Every tensor, the worst of its calls</h2>"
        yield from _table(tensors)


def _first(finding: Finding) -> Iterable[str]:
    """Where, what, shapes, and the worst elements with both values."""
    limit = "" if finding.limit is None else f", limit {finding.limit:.0e}"
    result = finding.result
    yield f'<div class="first"><h3>First diverging tensor: {escape(f"{finding.place}, {finding.operator}")}</h3>'
    yield f"<p><code>{escape(finding.tensor)}</code> {_shape(result.shape)}, packed call {finding.step}<br>"
    yield f"relative error <b>{finding.error:.2e}</b>{limit}; cosine {result.cosine:.6f}"
    yield f"{f'<br>{escape(finding.note)}' if finding.note else ''}</p>"
    if result.worst:
        yield '<table><tr><th>worst elements<th class="n">expected<th class="n">found<th class="n">difference</tr>'
        for w in result.worst:
            numbers = (f"{w.expected:.7g}", f"{w.found:.7g}", f"{w.found - w.expected:+.3g}")
            yield f"<tr><td>{list(w.index)}{''.join(f'<td class=n>{number}' for number in numbers)}</tr>"
        yield "</table>"
    if finding.inputs:
        given = ", ".join(f"<code>{escape(name)}</code> {_shape(shape)}" for name, shape in finding.inputs)
        yield f"<p>given: {given}</p>"
    yield "</div>"


def _whole(whole: Whole) -> Iterable[str]:
    yield f"<h2>{escape(f'{whole.found}, beside {whole.expected}')}</h2>"
    shares = ("top1", "top5")
    rows = ((_FIGURES[k], f"{v:.2%}" if k in shares else f"{v:.6g}") for k, v in whole.summary().items())
    yield f"<table>{''.join(f'<tr><td>{name}<td class=n>{value}</tr>' for name, value in rows)}</table>"
    caches: dict[str, float] = {}
    for finding in sorted(whole.findings, key=lambda finding: finding.tensor == "logits"):  # they come last
        caches[finding.place] = max(caches.get(finding.place, 0.0), finding.error)
    if len(caches) > 1:
        yield "<h3>Keys and values of each layer, and logits: largest relative error, each side going on by itself</h3>"
        yield log_bars(caches, whole.findings[0].limit)
    yield from _by_position(whole.rows)


def _by_position(rows: Sequence[LogitRow]) -> Iterable[str]:
    borders = [i + 1 for i, (one, other) in enumerate(pairwise(rows)) if one.sequence != other.sequence]
    below = "positions of the sequences, one after another" if borders else "position"
    yield f"<h3>{_BY_POSITION}</h3>"
    yield line_plot([row.kl for row in rows], [not row.top1 for row in rows], "KL, nats", below, borders)


def _table(findings: Sequence[Finding]) -> Iterable[str]:
    yield '<table><tr><th>where<th>operator<th>tensor<th>shape<th class="n">relative error<th class="n">cosine'
    yield '<th class="n">limit<th>verdict<th>note</tr>'
    for f in findings:
        limit = "" if f.limit is None else f"{f.limit:.0e}"
        name = escape(f.tensor.removeprefix("v_").removeprefix("model.").removeprefix(f"{_path(f.place)}."))
        yield (
            f"<tr{'' if f.ok else ' class=failed'}><td>{escape(f.place)}<td>{escape(f.operator)}<td>{name}"
            f"<td>{_shape(f.result.shape)}<td class=n>{f.error:.1e}<td class=n>{f.result.cosine:.6f}<td class=n>{limit}"
            f"<td>{('ok' if f.limit is not None else 'not judged') if f.ok else 'FAILED'}<td>{escape(f.note)}</tr>"
        )
    yield "</table>"


def _path(place: str) -> str:
    return place.replace("layer ", "layers.")


def _shape(shape: Sequence[int]) -> str:
    return f"[{'×'.join(map(str, shape))}]"


def _study(study: Study) -> Iterable[str]:
    yield f"<p>{escape(f'{study.found} beside {study.expected}; {study.data}')}</p><table>"
    yield from (f"<tr><td>{escape(name)}<td class=n>{escape(value)}</tr>" for name, value in study.figures())
    yield "</table>"
    if study.experts:
        yield "<h2>Tokens that take the same experts, by layer</h2>"
        yield share_bars({f"layer {e.layer}": e.same_set for e in study.experts})
        yield "<h2>Experts that both sides take, by layer</h2>"
        yield share_bars({f"layer {e.layer}": e.common for e in study.experts})
    yield from _by_position(study.rows)
