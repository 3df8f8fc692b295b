"""What an ONNX file holds, read without its weights: inputs, outputs, operators, versions."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from angelforge.errors import AngelForgeError


@dataclass(frozen=True)
class Port:
    """An input or output of a graph; symbolic sizes are names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class GraphSummary:
    """An ONNX model in numbers. `operators` counts the main graph's nodes; names outside ONNX have their domain."""

    nbytes: int
    ir_version: int
    opsets: Mapping[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    operators: Mapping[str, int]
    functions: int
    initializers: int

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        facts = asdict(self)
        return {"bytes": facts.pop("nbytes"), **facts}


def summarize_graph(path: Path) -> GraphSummary:
    """Read an ONNX file. Raises AngelForgeError where it is none; external data may be absent."""
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise AngelForgeError(f"{path} is no ONNX file, or a damaged one: {error}. Write it again.") from error
    if not model.ir_version:
        raise AngelForgeError(f"{path} is no ONNX file: it names no IR version. Write it again.")
    graph = model.graph
    counts = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in graph.node)
    return GraphSummary(
        nbytes=path.stat().st_size,
        ir_version=model.ir_version,
        opsets={item.domain or "ai.onnx": item.version for item in model.opset_import},
        inputs=_ports(graph.input),
        outputs=_ports(graph.output),
        operators=dict(counts.most_common()),
        functions=len(model.functions),
        initializers=len(graph.initializer),
    )


def _ports(values: Iterable[onnx.ValueInfoProto]) -> tuple[Port, ...]:
    found = []
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(size.dim_param or size.dim_value for size in tensor.shape.dim)
        found.append(Port(value.name, onnx.TensorProto.DataType.Name(tensor.elem_type).lower(), shape))
    return tuple(found)
