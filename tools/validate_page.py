"""The report page of a validation: verdict, plots, the first diverging tensor and all operators in one HTML file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from angelforge.atomic import write_atomic
from angelforge.diskerrors import explained
from angelforge.runtime.validate.compare import Finding
from angelforge.runtime.validate.results import Validation, describe, error_by_place, worst_by_tensor
from angelforge.runtime.validate.whole import Whole
from angelforge.tools.plots import line_plot, log_bars

if TYPE_CHECKING:
    from angelforge.runtime.validate.study import Study
    from angelforge.tools.validate_verdict import Verdict

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px}
td,th{padding:2px 12px 2px 0;text-align:left}th{border-bottom:1px solid #999}
.ok{color:#2a7d2a}.failed{color:#b3261e;font-weight:bold}pre{background:#f6f6f6;padding:.8em;overflow-x:auto}
svg text{font:11px system-ui,sans-serif;fill:#555}
"""


def write_page(path: Path, result: Validation, judged: Verdict | None) -> None:
    """Writes the page; raises AngelForgeError where the disk refuses."""
    _write(path, f"{Path(result.subject).name}: {'ok' if result.ok else 'FAILED'}", _validation(result, judged))


def write_study_page(path: Path, study: Study) -> None:
    """Writes the page of a precision study."""
    _write(path, "What the precision costs", _study(study))


def _write(path: Path, title: str, parts: Iterable[str]) -> None:
    body = "\n".join(parts)
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )
    with explained("write", path):
        write_atomic(path, text)


def _validation(result: Validation, judged: Verdict | None) -> Iterable[str]:
    state = "ok" if result.ok else "failed"
    yield f'<p class="{state}">{"ok" if result.ok else "FAILED"}</p>'
    yield f"<p>{escape(f'{result.precision}, engine {result.engine}; {result.data}')}</p>"
    if result.first is not None:
        yield f"<pre>{escape(chr(10).join(describe(result.first)))}</pre>"
    for title, findings in (("layer", result.layers), ("operator", result.operators)):
        if findings:
            yield f"<h2>Largest error of each layer, {title} by {title}</h2>"
            yield log_bars(error_by_place(findings), result.limits.operator)
    for whole in result.wholes:
        yield from _whole(whole)
    tensors = worst_by_tensor((*result.layers, *result.operators))
    if tensors:
        yield "<h2>Every tensor</h2>"
        yield from _table(tensors)


def _whole(whole: Whole) -> Iterable[str]:
    figures = whole.summary()
    yield f"<h2>{escape(whole.found)} beside {escape(whole.expected)}</h2>"
    rows = ((name.replace("_", " "), f"{value:.6g}") for name, value in figures.items())
    cells = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows)
    yield f"<table>{cells}</table>"
    caches: dict[str, float] = {}
    for finding in whole.findings:
        caches[finding.place] = max(caches.get(finding.place, 0.0), finding.error)
    if len(caches) > 1:
        yield "<h3>Keys, values and logits: largest relative error</h3>"
        yield log_bars(caches, None)
    yield "<h3>By position: KL in nats; red where the best token differs</h3>"
    yield line_plot([row.kl for row in whole.rows], [not row.top1 for row in whole.rows])


def _table(findings: Sequence[Finding]) -> Iterable[str]:
    yield "<table><tr><th>where<th>operator<th>tensor<th>shape<th>relative error<th>cosine<th>limit<th></tr>"
    for f in findings:
        limit = "" if f.limit is None else f"{f.limit:.0e}"
        verdict = '<td class="ok">ok' if f.ok else '<td class="failed">FAILED'
        shape = "×".join(map(str, f.result.shape))
        name = escape(f.tensor.removeprefix("v_"))
        yield (
            f"<tr><td>{escape(f.place)}<td>{escape(f.operator)}<td>{name}<td>{shape}<td>{f.error:.2e}"
            f"<td>{f.result.cosine:.6f}<td>{limit}{verdict} {escape(f.note)}</tr>"
        )
    yield "</table>"


def _study(study: Study) -> Iterable[str]:
    yield f"<p>{escape(f'{study.found} beside {study.expected}; {study.data}')}</p><table>"
    yield from (f"<tr><td>{escape(name)}<td>{escape(value)}</tr>" for name, value in study.figures())
    yield "</table><h2>Tokens that take the same experts, by layer</h2>"
    yield line_plot([e.same_set for e in study.experts], [False] * len(study.experts), top=1.0)
    yield "<h2>By position: KL in nats; red where the best token differs</h2>"
    yield line_plot([row.kl for row in study.rows], [not row.top1 for row in study.rows])
