"""Which options of `angelforge validate` go together: one that would do nothing is refused."""

from __future__ import annotations

from collections.abc import Iterable

import click
from click.core import ParameterSource

from angelforge.errors import UsageError

_COMPARED = ("engine", "reference", "by_layer", "by_operator", "draft", "layers")
_TOKENS = ("tokens", "dialogues", "count")


def refuse_for_checkpoint() -> None:
    """Of a CHECKPOINT only --layers, --length, --seed and --json mean something.

    Raises:
        UsageError: another option was given.
    """
    others = (*(name for name in _COMPARED if name != "layers"), "against", *_TOKENS, "chunk", "padding", "html")
    _refuse(
        others, "is for bundles; the layers of a checkpoint are run on random states. Export it first, or leave it out."
    )


def refuse_for_study() -> None:
    """A precision study runs two graphs as wholes; raises UsageError for an option that compares something else."""
    _refuse(_COMPARED, "does not go with --against, which runs two whole graphs and no engine. Leave one of them out.")


def refuse_for_draft() -> None:
    """A draft is compared operator by operator; raises UsageError for an option of the target's comparison."""
    others = (name for name in _COMPARED if name not in ("engine", "draft", "reference"))
    _refuse(others, "does not go with --draft, whose engine is compared operator by operator. Leave one of them out.")


def refuse_other_tokens() -> None:
    """Tokens come from one place; raises UsageError where another is named, or the length of tokens that are given."""
    named = [name for name in _TOKENS if _given(name)]
    if len(named) > 1:
        _refuse(named, "does not go with another of --tokens, --dialogues and --random. Name one.")
    if named and named != ["count"]:
        _refuse(("length",), "is the length of --random sequences; tokens that are given have their own. Leave it out.")


def _refuse(names: Iterable[str], why: str) -> None:
    for name in names:
        if _given(name):
            option = next(p for p in click.get_current_context().command.params if p.name == name)
            raise UsageError(f"{option.opts[0]} {why}")


def _given(name: str) -> bool:
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE
