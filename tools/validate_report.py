"""Validations as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from angelforge.runtime.validate.compare import Finding
from angelforge.runtime.validate.results import Validation, describe, worst_by_tensor
from angelforge.tools.output import print_table

if TYPE_CHECKING:
    from angelforge.runtime.validate.halves import LayerCheck
    from angelforge.runtime.validate.study import Study
    from angelforge.tools.validate_verdict import Verdict


def print_validation(result: Validation, html: Path | None, judged: Verdict | None) -> None:
    """Figures, the first diverging tensor, and of a failure what to type next."""
    click.echo(f"{result.title} in {result.precision}, engine {result.engine}; {result.data}")
    for whole in result.wholes:
        figures = whole.summary()
        click.echo(f"{whole.found} beside {whole.expected}:")
        click.echo(
            f"  logits: relative error {figures['relative_error']:.2e}, largest {figures['max_error']:.3g}, "
            f"cosine {figures['cosine']:.6f}, KL {figures['mean_kl']:.2e} (at most {figures['max_kl']:.2e}), "
            f"top-1 {figures['top1']:.1%}, top-5 {figures['top5']:.1%}"
        )
        for prefix, told in (("cache.", "keys and values"), ("draft_hidden", "captured states for the draft")):
            worst = max((f for f in whole.findings if f.tensor.startswith(prefix)), key=lambda f: f.error, default=None)
            if worst is not None:
                click.echo(f"  {told}: relative error at most {worst.error:.2e} ({worst.place})")
    _print_findings("layers, each with the judge's inputs", result.layers)
    _print_findings("operators, each with the judge's inputs", result.operators)
    told = "tensors of the draft" if result.draft else "half layers of the bundle"
    _print_findings(f"{told} beside the reference", result.halves)
    if result.first is not None:
        for line in describe(result.first):
            click.echo(line)
    for line in () if judged is None else judged.lines():
        click.echo(line)
    if result.wholes and result.limits.logits is None and result.operators:
        click.echo(
            f"{result.precision} is judged operator by operator, and loosely as a whole: "
            "one rounding step changes everything behind it."
        )
    if html is not None:
        click.echo(f"page: {html}")
    click.echo("ok" if result.ok else "FAILED")


def _print_findings(title: str, findings: Sequence[Finding]) -> None:
    if not findings:
        return
    rows: list[tuple[str, ...]] = []
    kinds: dict[tuple[str, str], list[Finding]] = {}
    for finding in worst_by_tensor(findings):
        kinds.setdefault((finding.place, finding.operator), []).append(finding)
    for (place, operator), members in kinds.items():
        worst = max(members, key=lambda f: (not f.ok, f.error))
        limit = "" if worst.limit is None else f"{worst.limit:.0e}"
        verdict = "FAILED" if not worst.ok else "ok" if worst.limit is not None else "not judged"
        rows.append((place, operator, f"{worst.error:.2e}", limit, verdict, worst.note))
    failed = [row for row in rows if row[4] == "FAILED"]
    shown = failed or sorted(rows, key=lambda row: -float(row[2]))[:8]
    told = f"{len(rows)} {title}: {len(failed)} beyond their limits" + (
        "" if failed else "; those with the largest errors"
    )
    print_table(("where", "operator", "relative error", "limit", "", "note"), shown, title=told)


def print_layers(checks: Sequence[LayerCheck]) -> None:
    """The layers of a checkpoint beside the independent model."""
    print_table(
        ("layer", "half", "tokens", "relative error", "limit", "", "note"),
        [
            (
                str(half.layer),
                half.half,
                str(half.tokens),
                f"{half.result.relative_error:.2e}",
                f"{half.limit:.0e}",
                "ok" if half.ok else "FAILED",
                half.note,
            )
            for half in checks
        ],
    )
    for half in checks:
        if not half.ok:
            for worst in half.result.worst:
                click.echo(
                    f"  layer {half.layer}, {half.half} at {list(worst.index)}: expected {worst.expected:.7g}, "
                    f"found {worst.found:.7g}"
                )
    click.echo("ok" if all(half.ok for half in checks) else "FAILED")


def layers_dict(subject: Path, checks: Sequence[LayerCheck]) -> dict[str, Any]:
    """The same for machines."""
    return {"ok": all(c.ok for c in checks), "subject": str(subject), "layers": [check.to_dict() for check in checks]}


def print_study(study: Study, html: Path | None) -> None:
    """What a precision costs, on the same tokens."""
    click.echo(f"{study.found} beside {study.expected}; {study.data}")
    print_table(("figure", "value"), study.figures())
    if study.experts:
        print_table(
            ("layer", "tokens with the same experts", "experts in common"),
            [(str(e.layer), f"{e.same_set:.1%}", f"{e.common:.1%}") for e in study.experts],
            title="routing by layer",
        )
    if html is not None:
        click.echo(f"page: {html}")
