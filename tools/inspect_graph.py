"""What `inspect` tells about an ONNX file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from angelforge.tools.graph_summary import GraphSummary, Port, summarize_graph
from angelforge.tools.output import format_bytes, print_table


@dataclass(frozen=True)
class GraphReport:
    """One ONNX file."""

    path: Path
    graph: GraphSummary

    @classmethod
    def read(cls, path: Path) -> "GraphReport":
        """Read an ONNX file. Raises AngelForgeError where it is none."""
        return cls(path, summarize_graph(path))

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {"kind": "onnx", "path": str(self.path), **self.graph.to_dict()}

    def show(self) -> None:
        """Print it for people."""
        print_graph(str(self.path), self.graph)


def print_graph(title: str, graph: GraphSummary) -> None:
    """Sizes and versions in a line, then ports and operators as tables; numbered ports are one row."""
    opsets = ", ".join(f"{domain} {version}" for domain, version in graph.opsets.items())
    counts = (
        f"{sum(graph.operators.values()):,} nodes, {graph.functions} functions, {graph.initializers:,} initializers"
    )
    click.echo(f"{title}: {format_bytes(graph.nbytes)}, {counts}; IR {graph.ir_version}, {opsets}")
    print_ports(graph)
    print_table(["operator", "nodes"], [[name, f"{count:,}"] for name, count in graph.operators.items()])


def print_ports(graph: GraphSummary) -> None:
    """Inputs and outputs as a table."""
    ports = [*_rows("input", graph.inputs), *_rows("output", graph.outputs)]
    print_table(["", "name", "type"], ports)


def _rows(kind: str, ports: tuple[Port, ...]) -> list[list[str]]:
    """`kv_cache.0`, `kv_cache.1`, … of one type become `kv_cache.0 … kv_cache.31`."""
    groups: dict[tuple[str, str], list[str]] = {}
    for port in ports:
        stem = port.name.rstrip("0123456789")
        groups.setdefault((stem if stem != port.name else port.name, str(port)), []).append(port.name)
    return [
        [kind, names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}", text]
        for (_, text), names in groups.items()
    ]
