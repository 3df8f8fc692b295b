"""What a failed validation means, and the command to type next."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from angelforge.runtime.validate.results import Validation


@dataclass(frozen=True)
class Verdict:
    """A sentence, and commands that lead on, each with the question that it answers."""

    text: str
    next: tuple[tuple[str, str], ...] = ()

    def lines(self) -> list[str]:
        """For people: the commands, to be copied."""
        return [f"next: {command}    ({question})" for command, question in self.next]


def verdict(result: Validation) -> Verdict:
    """Of a validation that failed: the engine, or only the graph beside the reference."""
    by_engine = [whole for whole in result.wholes if not whole.reference]
    if all(whole.ok for whole in by_engine) and all(f.ok for f in (*result.layers, *result.operators)):
        return _of_graph(result)
    text = "The engine does not compute what its bundle says; see the first diverging tensor."
    first = result.first
    if first is None or not first.place.startswith("layer ") or result.draft:
        return Verdict(text)
    command = (
        f"angelforge validate {shlex.quote(result.subject)} --engine {result.engine} --layers {_number(first.place)}"
    )
    return Verdict(text, ((command, "this layer alone, every operator"),))


def _of_graph(result: Validation) -> Verdict:
    wrong = next((half for half in result.halves if not half.ok), None)
    places = [wrong.place] if wrong is not None else _suspects(result)
    layers = ",".join(_number(place) for place in places if place.startswith("layer "))
    verify = (f"angelforge inspect {shlex.quote(result.subject)} --verify", "are its weights as they were exported?")
    alone = (
        f"angelforge validate {shlex.quote(result.checkpoint or 'CHECKPOINT')} --layers {layers}",
        "does this version export and compute the layer rightly?" if wrong is not None else "which of them is wrong?",
    )
    steps = (verify, alone) if layers else (verify,)
    text = "The bundle's graph differs from the reference, its engine agrees with the graph."
    if wrong is not None:
        return Verdict(f"{text} It differs in {wrong.place}: its weights or what is computed with them.", steps)
    if result.halves:
        return Verdict(f"{text} Each layer by itself agrees: positions, pages or calls are taken otherwise.", (verify,))
    return Verdict(f"{text} If they should be the same model, see which layer it is.", steps)


def _suspects(result: Validation) -> list[str]:
    """The layers where what differs first may arise: keys and values of a layer stand behind the one before it."""
    whole = next((whole for whole in result.wholes if whole.reference and whole.first is not None), None)
    if whole is None or whole.first is None or not whole.first.place.startswith("layer "):
        return ["layer 0", "layer 1"]
    number = int(_number(whole.first.place))
    return [f"layer {layer}" for layer in range(max(number - 1, 0), number + 1)]


def _number(place: str) -> str:
    return place.removeprefix("layer ")
