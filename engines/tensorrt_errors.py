"""TensorRT's messages in words of the model: which layer, of what shapes, the probable cause, what to do."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

# TensorRT wraps a message as: Error Code 4: Internal Error (MESSAGE In FUNCTION at FILE:LINE).
_WRAPPED = re.compile(r"Error Code \d+: [\w ]+ \((.*?)\.? In \w[^\s]* at [^)]*\)+", re.DOTALL)
_NODE = re.compile(r"(?P<place>[\w./-]+)/(?P<operator>\w+)_node_\d+")
# Follows every error on a machine without a GPU, whatever the error was.
_NOISE = re.compile(r"cudaError 35|^\[checkMacros")

_CAUSES: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"out of memory|OutOfMemory|insufficient memory|amount of GPU memory|std::bad_alloc", re.IGNORECASE),
        "There is not enough memory on the GPU: end other programs that use it, or lower --max-tokens or --pages.",
    ),
    (
        re.compile(r"Plugin not found"),
        "There is no plugin of that name and version: the bundle was exported by another version of angelforge, "
        "export it again.",
    ),
    (
        re.compile(r"HW-specific datatypes"),
        "The architecture cannot compute in this precision: build for a newer one, or export another --precision.",
    ),
    (
        re.compile(r"could not find any (supported formats|implementation)", re.IGNORECASE),
        "No implementation takes these types and shapes: the bundle may have been changed, export it again.",
    ),
    (
        re.compile(r"not self-consistent|missing dimensions in profile|Invalid optimization profile"),
        "The profiles contradict the graph: please report this with the options of the build.",
    ),
    (
        re.compile(r"CUDA initialization failure|insufficient for CUDA runtime"),
        "The NVIDIA driver does not work or is too old: install driver 580 or newer.",
    ),
)


def describe_nodes(model: ir.Model) -> dict[str, str]:
    """For each node of a graph: its place in the model, operator, and the inputs' shapes and types."""

    def tensor(value: ir.Value) -> str:
        shape = ", ".join(str(d) if isinstance(d, int) else str(d.value) for d in value.shape or ())
        return f"{value.dtype.name.lower() if value.dtype else '?'} [{shape}]"

    return {
        node.name: f"{_place(node.name)} ({node.op_type} of {', '.join(tensor(v) for v in node.inputs if v)})"
        for node in model.graph
        if node.name
    }


def explain_parser_errors(title: str, errors: Sequence[Any], nodes: Mapping[str, str]) -> str:
    """One text for the ONNX parser's errors (`IParserError`); `nodes` as `describe_nodes` gives it."""
    if not errors:
        return f"{title} cannot read the graph and does not say why; please report this."
    first = errors[0]
    name = first.node_name()
    message = _message(first.desc())
    if message == "false":  # an assertion without a text
        message = first.code().name.lower().replace("_", " ")
    where = f" the layer {nodes.get(name, name)}" if name else " the graph"
    more = len({error.node_name() for error in errors}) - 1
    others = f" and {more} more" if more > 0 else ""
    return f"{title} refuses{where}{others}: {message}. {_cause(message)}".rstrip()


def explain_build_errors(title: str, errors: Sequence[str], nodes: Mapping[str, str], log: Path) -> str:
    """One text for what TensorRT said before it gave a build up."""
    telling = [error for error in errors if not _NOISE.search(error)] or list(errors)
    if not telling:
        return f"{title} gave the build up without saying why. All it said is in {log}."
    found = next((nodes[match[0]] for match in _NODE.finditer(telling[0]) if match[0] in nodes), None)
    where = f" at the layer {found}" if found else ""
    message = _message(telling[0])
    return f"{title} gave the build up{where}: {message}. {_cause(message)} All it said is in {log}.".replace("  ", " ")


def explain_run_errors(title: str, doing: str, errors: Sequence[str]) -> str:
    """One text for what TensorRT said when it would not load or run an engine; `doing` follows "cannot"."""
    if not errors:
        return f"{title} cannot {doing} and does not say why. angelforge doctor --deep tries the machine out."
    telling = next((error for error in errors if not _NOISE.search(error)), None)
    if telling is None:
        return f"{title} cannot {doing}. {_cause(errors[0])}".rstrip()
    return f"{title} cannot {doing}: {_message(telling)}. {_cause(telling)}".rstrip()


def _place(name: str) -> str:
    """`model/layers.0/attention/QKVPrepare_node_3` as `model.layers.0.attention`."""
    match = _NODE.fullmatch(name)
    return (match["place"] if match else name).replace("/", ".")


def _message(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not _NOISE.search(line)]
    wrapped = _WRAPPED.search("\n".join(lines))
    message = wrapped[1] if wrapped else lines[0] if lines else "no reason given"
    quoted = re.search(r'&& "([^"]+)"', message)
    return _NODE.sub(lambda match: _place(match[0]), (quoted[1] if quoted else message).strip().rstrip(".?"))


def _cause(text: str) -> str:
    return next((cause for pattern, cause in _CAUSES if pattern.search(text)), "")
