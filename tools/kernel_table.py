"""Compiles the kernels of AntAngelMed's graph for a GPU that need not be there, and tabulates their machine code.

`python -m angelforge.tools.kernel_table --page docs/kernels-sm90.md` brings that page up to date. It needs triton and
no GPU, and takes a minute, then seconds from Triton's cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import onnx_ir as ir

from angelforge.atomic import write_atomic
from angelforge.config import ModelConfig
from angelforge.exporter.graph import build_graph
from angelforge.exporter.synthetic_config import FULL_CONFIG
from angelforge.plugins.binding import Binding, bind
from angelforge.plugins.kernel import Gpu, Tile
from angelforge.plugins.operator import DOMAIN, Operator
from angelforge.plugins.registry import OPERATORS
from angelforge.precision import Precision

if TYPE_CHECKING:
    from angelforge.plugins.compile import Compiled

PROFILES = (8, 64, 256, 8192)  # most tokens of a call
PAGE_SIZE = 64
ARCHITECTURE = "sm_90"  # of the page
WEIGHTS = ("weight", "table", "gate", "down", "kv_cache")  # the input whose sizes a row shows
STEP = ("T", "pages")  # symbols that a step or a pool decides
SAMPLING = "sampling"  # the kernels that are no operators
PARTS = ("fp8", "bf16", SAMPLING)
WITHOUT_KERNEL = ("AllReduce",)  # removed for one rank, a native layer for several


@dataclass(frozen=True)
class Row:
    """One tile of one kernel, and what its code holds."""

    operator: str
    sizes: str  # that weights fix
    profiles: tuple[int, ...]  # the profiles whose default tile it is
    tile: Tile
    registers: int
    shared: int
    stack: int
    spills: int
    scratch: int
    counts: dict[str, int]

    @classmethod
    def of(cls, name: str, sizes: str, profiles: Sequence[int], tile: Tile, code: Compiled) -> Row:
        """What compiled code says of itself."""
        return cls(
            operator=name,
            sizes=sizes,
            profiles=tuple(profiles),
            tile=tile,
            registers=code.registers,
            shared=code.shared,
            stack=code.stack,
            spills=code.spills,
            scratch=code.scratch,
            counts=dict(code.counts),
        )


def nodes(precision: Precision) -> Iterator[tuple[Operator, Binding]]:
    """Every different call of an operator in the graph of a dense and an expert layer, embedding and head.

    Sizes that a step decides are 1: a kernel's code does not depend on them.
    """
    graph = build_graph(ModelConfig.from_dict(FULL_CONFIG).with_layers(2), precision, PAGE_SIZE, 32768).graph
    seen = []
    for node in graph:
        if node.domain != DOMAIN or node.op_type in WITHOUT_KERNEL:
            continue
        operator = OPERATORS[node.op_type]
        attributes = {str(name): attribute.value for name, attribute in node.attributes.items()}
        binding = bind(operator, *_signature(node), attributes)
        key = (operator.name, dict(binding.dims), dict(binding.types))
        if key not in seen:
            seen.append(key)
            yield operator, binding


def _signature(node: ir.Node) -> tuple[list[list[int]], list[ir.DataType]]:
    shapes, types = [], []
    for value in node.inputs:
        assert value is not None and value.shape is not None and value.dtype is not None
        shapes.append([size if isinstance(size, int) else 1 for size in value.shape])
        types.append(value.dtype)
    return shapes, types


def rows(operator: Operator, binding: Binding, architecture: str = ARCHITECTURE) -> Iterator[Row]:
    """The different default tiles of an operator's kernel, compiled for an architecture."""
    from angelforge.plugins.compile import compile_kernel
    from angelforge.plugins.tensorrt.kernels import find_kernel

    kernel, gpu = find_kernel(operator), Gpu(architecture, 1)
    tiles: dict[Tile, list[int]] = {}
    for tokens in PROFILES:
        tiles.setdefault(kernel.tile_on(gpu, binding.dims, tokens), []).append(tokens)
    weight = next((port for port in operator.inputs if port.name in WEIGHTS), operator.inputs[0])
    sizes = "×".join(
        str(binding.dims[symbol]) for symbol in weight.shape if isinstance(symbol, str) and symbol not in STEP
    )
    for tile, profiles in tiles.items():
        code = compile_kernel(kernel, binding, tile, architecture)
        yield Row.of(operator.name, sizes, profiles, tile, code)


def sampling_rows(architecture: str = ARCHITECTURE) -> Iterator[Row]:
    """The kernels that choose tokens, with masks and without, compiled for an architecture."""
    from angelforge.plugins.compile import compile_sampling
    from angelforge.plugins.sampling import kernels

    vocab: int = FULL_CONFIG["vocab_size"]
    words = kernels.group_count(vocab)
    for what, kernel, ids in (
        ("", kernels.group_rows(vocab, 0, tempered=True), kernels.GROUPS_A_PROGRAM * kernels.GROUP),
        (", masks", kernels.group_rows(vocab, words, tempered=True), kernels.GROUPS_A_PROGRAM * kernels.GROUP),
        ("", kernels.choose(vocab, 0), kernels.CANDIDATES),
        (", masks", kernels.choose(vocab, words), kernels.CANDIDATES),
        ("", kernels.measure(vocab), kernels.CANDIDATES),
        ("", kernels.penalize(vocab, 0), kernels.ENTRIES_A_PROGRAM),
        (", proposals", kernels.penalize(vocab, kernels.columns_for(4)), kernels.ENTRIES_A_PROGRAM),
    ):
        code = compile_sampling(kernel, architecture)
        tile = Tile(m=1, n=ids, k=1, warps=kernel.warps, stages=1)
        yield Row.of(kernel.function.__name__, f"{vocab}{what}", PROFILES, tile, code)


def table(
    parts: Sequence[str],
    operators: Sequence[str] = (),
    one_size: bool = False,
    architecture: str = ARCHITECTURE,
) -> dict[str, Any]:
    """All rows of precisions and of "sampling", by these names, and the compiler that made them.

    Of these operators, or of all; with `one_size` of each only the first of the sizes that the graph has.
    """
    from angelforge.plugins.compile import COMPILER

    found: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        if part == SAMPLING:
            found[part] = [asdict(row) for row in sampling_rows(architecture)]
            continue
        chosen = [node for node in nodes(Precision(part)) if not operators or node[0].name in operators]
        if one_size:
            chosen = list({operator.name: (operator, binding) for operator, binding in reversed(chosen)}.values())[::-1]
        found[part] = [asdict(row) for node in chosen for row in rows(*node, architecture)]
    return {"compiler": COMPILER, "architecture": architecture, "parts": found}


FIRST_TABLE = "### "  # where the tables of the page begin
COLUMNS = ("instructions", "wgmma e4m3", "wgmma bf16", "mma.sync f16", "fp8 to f16", "16-byte loads")
HEAD = ("operator", "sizes", "tokens ≤", "tile m×n×k, warps, stages", "registers", "shared", "spills", *COLUMNS)


def markdown(found: dict[str, Any]) -> str:
    """The tables of docs/kernels-sm90.md."""
    lines = []
    for part, entries in found["parts"].items():
        lines += [f"{FIRST_TABLE}{part}, {found['compiler']}", "", _line(HEAD), "|---" * len(HEAD) + "|"]
        for row in entries:
            tile = row["tile"]
            shape = f"{tile['m']}×{tile['n']}×{tile['k']}, {tile['warps']}, {tile['stages']}"
            profiles = ", ".join(map(str, row["profiles"]))
            numbers = (row["registers"], row["shared"], row["spills"], *(row["counts"][name] for name in COLUMNS))
            lines.append(_line((row["operator"], row["sizes"], profiles, shape, *numbers)))
        lines.append("")
    return "\n".join(lines)


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
@click.option("--operator", "operators", multiple=True, help="This operator only; may be given several times.")
@click.option("--one-size", is_flag=True, help="Of each operator the first size only.")
@click.option("--architecture", default=ARCHITECTURE, show_default=True, help="The GPU to compile for.")
@click.option(
    "--page", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Replace the tables of this page."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def kernel_table(
    parts: tuple[str, ...],
    operators: tuple[str, ...],
    one_size: bool,
    architecture: str,
    page: Path | None,
    as_json: bool,
) -> None:
    """Tabulate the machine code of all kernels."""
    found = table(parts or PARTS, operators, one_size, architecture)
    if page is not None:
        text = page.read_text(encoding="utf-8")
        write_atomic(page, text[: text.index(FIRST_TABLE)] + markdown(found))
    else:
        click.echo(json.dumps(found) if as_json else markdown(found))


if __name__ == "__main__":
    kernel_table()
