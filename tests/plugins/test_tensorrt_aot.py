"""Ahead-of-time plugins: NVIDIA's own classes, of the real TensorRT 11 bindings, ask for shapes, sizes and PTX."""

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from support.empty_tensorrt import empty_tensorrt

from angelforge.errors import AngelForgeError
from angelforge.plugins.binding import bind
from angelforge.plugins.kernel import Gpu
from angelforge.plugins.registry import OPERATORS
from angelforge.plugins.tensorrt.fetched import Kernels
from angelforge.plugins.tensorrt.kernels import find_kernel, kernel_digest

pytest.importorskip("triton")

TESTS = Path(__file__).resolve().parents[1]
H20 = Gpu("sm_90", 78)
STATIC_SHARED = 48 * 1024  # bytes; whether TensorRT asks for more is not known
PROFILES = (8, 64, 256, 8192)  # most tokens; the last one is for prompts
NORM_DIVISIONS = 2  # of the mean and of the inverse root
INEXACT_DIVISIONS = {"NormQuantize": 0, "AddNormQuantize": 0, "AttentionMergeQuantize": 1}  # by the parts' weight
ONNX_NAMES = {"FLOAT": "FLOAT", "BF16": "BFLOAT16", "FP8": "FLOAT8E4M3FN", "INT32": "INT32", "INT64": "INT64"}


def environment(folder: Path) -> dict[str, str]:
    """One in which the bindings of TensorRT 11 can be imported and kernels be compiled."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return kept | {"LD_LIBRARY_PATH": str(empty_tensorrt(folder)), "PYTHONPATH": str(TESTS)}


@pytest.fixture(scope="module", params=[("fp8", *PROFILES), ("bf16", *PROFILES)], ids=lambda params: params[0])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What NVIDIA's classes were told of every operator of a precision, in every profile."""
    command = [sys.executable, "-m", "support.nvidia_plugins", *map(str, request.param)]
    folder = tmp_path_factory.mktemp("tensorrt")
    result = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def driven(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each operator and profile."""
    rows: list[dict[str, Any]] = report["rows"]
    return rows


def test_every_operator_is_driven(driven: list[dict[str, Any]]) -> None:
    """The target's of its precision, and the draft's."""
    names = {row["operator"] for row in driven}
    fp8 = {name for name in OPERATORS if name.startswith("Fp8") or name.endswith("Quantize")}
    bf16 = {"Norm", "GateUp", "MoEGateUp", "MoEDown", "AttentionMerge"}
    common = set(OPERATORS) - fp8 - bf16 - {"AllReduce"}
    assert common <= names
    assert names >= fp8 or names >= bf16


def test_shapes_and_types_are_the_operators(driven: list[dict[str, Any]]) -> None:
    """Though the fields arrive in reversed order, which permutes what NVIDIA's classes hand on by position."""
    for row in driven:
        operator = OPERATORS[row["operator"]]
        types = [ir.DataType[ONNX_NAMES[name]] for name in row["types"]]
        expected = [dtype.name for dtype in operator.output_types(types, row["attributes"])]
        assert [ONNX_NAMES[name] for name in row["output_types"]] == expected
        assert row["formats"] == [[name, "LINEAR"] for name in (*row["types"], *row["output_types"])]
        for step in row["steps"]:
            binding = bind(operator, step["inputs"], types, row["attributes"])
            assert step["outputs"] == [list(shape) for shape in binding.output_shapes], row["operator"]


def test_launches_are_the_kernels(driven: list[dict[str, Any]]) -> None:
    """Grid and integer arguments, evaluated at other sizes than the profile's, are what the launch rule gives there."""
    for row in driven:
        operator, kernel = OPERATORS[row["operator"]], find_kernel(OPERATORS[row["operator"]])
        types = [ir.DataType[ONNX_NAMES[name]] for name in row["types"]]
        assert row["extra_types"] == ["INT32"] * len(kernel.extras)
        most = bind(operator, row["steps"][-1]["inputs"], types, row["attributes"]).dims["T"]  # for the head: rows
        for step in row["steps"]:
            dims = bind(operator, step["inputs"], types, row["attributes"]).dims
            tile = kernel.tile(dims, most)
            launch = step["launch"]
            assert (launch["grid_x"], launch["grid_y"], launch["grid_z"]) == tuple(kernel.grid(dims, H20, tile))
            assert step["extras"] == [dims[name] for name in kernel.extras]
            assert (launch["block_x"], launch["block_y"], launch["block_z"]) == (tile.warps * 32, 1, 1)


def test_decode_tiles_fit_in_static_shared_memory(driven: list[dict[str, Any]]) -> None:
    """In every profile that decodes or verifies drafts; prompts may take more."""
    assert {row["most_tokens"] for row in driven} == set(PROFILES)
    for row in driven:
        if row["most_tokens"] < PROFILES[-1]:
            assert row["steps"][0]["launch"]["shared_mem"] <= STATIC_SHARED, (row["operator"], row["most_tokens"])


def test_aliased_outputs_are_told(driven: list[dict[str, Any]]) -> None:
    for row in driven:
        operator = OPERATORS[row["operator"]]
        names = [port.name for port in operator.inputs]
        expected = [operator.aliases.get(port.name) for port in operator.outputs]
        assert row["aliased"] == [-1 if name is None else names.index(name) for name in expected]


def test_parameters_are_inputs_extras_outputs(driven: list[dict[str, Any]]) -> None:
    """The PTX takes exactly what TensorRT passes, in its order, with the block size that TensorRT is told."""
    for row in driven:
        operator, kernel = OPERATORS[row["operator"]], find_kernel(OPERATORS[row["operator"]])
        head = re.search(rf"\.entry {row['entry']}\((.*?)\)\s*\.reqntid (\d+)", row["ptx"], re.DOTALL)
        assert head
        kinds = re.findall(r"\.param \.(\w+)", head[1])
        pointers, integers = ["u64"] * len(operator.inputs), ["u32"] * len(kernel.extras)
        assert kinds == [*pointers, *integers, *["u64"] * len(operator.outputs)], row["operator"]
        assert int(head[2]) == row["steps"][0]["launch"]["block_x"]
        assert ".debug_" not in row["ptx"]
        assert "/" not in row["ptx"].replace("//", ""), "a path of this machine"


def test_the_bytes_that_tensorrt_points_to_are_kept(driven: list[dict[str, Any]]) -> None:
    """TensorRT gets the address of Python's bytes, and the bindings hold only those of a plugin's last profile."""
    assert all(row["kept"] for row in driven)


def test_a_kernel_that_tensorrt_does_not_fetch_is_seen(report: dict[str, Any]) -> None:
    """It knows the launches of all profiles; if it fetches the code of the last one only, the build must not pass."""
    assert report["unfetched"] == []
    missing = {text.partition(" ")[0] for text in report["unfetched of one profile for all"]}
    assert len(missing) > 5
    assert "PagedAttention for up to 8 tokens" in report["unfetched of one profile for all"]


def test_such_a_build_is_refused() -> None:
    kernels = Kernels()
    code = [kernels.tell(text, f"Linear for up to {tokens} tokens") for text, tokens in ((b"a", 8), (b"b", 64))]
    assert code[1].encode() == b"b"
    with pytest.raises(AngelForgeError, match=r"no code for 1 kernels, first that of Linear for up to 8 tokens"):
        kernels.require_fetched()
    assert code[0].encode() == b"a"
    kernels.require_fetched()
    kernels.tell(b"c", "another")
    kernels.forget()
    kernels.require_fetched()
    again = [kernels.tell(text, "Linear") for text in (b"a", b"b")]  # the next build must fetch for itself
    again[0].encode()
    assert len(kernels.missing()) == 1


def test_bindings_that_read_code_otherwise_do_not_stop_builds() -> None:
    """No engine is without any code: where none was seen to be fetched, it was not seen, and that is all."""
    kernels = Kernels()
    assert bytes(kernels.tell(b"a", "Linear for up to 8 tokens"), "utf-8") == b"a"
    kernels.require_fetched()


def test_no_result_depends_on_the_order_of_threads(driven: list[dict[str, Any]]) -> None:
    """No kernel of any precision and profile adds by atomics: same input, same bits."""
    assert [row["operator"] for row in driven if re.search(r"\b(atom|red)\.", row["ptx"])] == []


def test_quantised_rows_are_divided_exactly(driven: list[dict[str, Any]]) -> None:
    """IEEE division of every value and scale, besides the norm's own two."""
    for row in driven:
        if row["operator"] in INEXACT_DIVISIONS:
            inexact = re.findall(r"\bdiv\.(?:full|approx)", row["ptx"])
            assert len(inexact) <= INEXACT_DIVISIONS[row["operator"]], row["operator"]
        if row["operator"] in ("NormQuantize", "AddNormQuantize"):
            values = row["steps"][0]["inputs"][0][-1] // row["steps"][0]["launch"]["block_x"]  # of a thread
            assert row["ptx"].count("div.rn.f32") >= values + 1 + NORM_DIVISIONS, row["operator"]


@cache
def complaints(ptx: str) -> str:
    """What ptxas says against a kernel; "" if it takes it. Profiles and precisions share many."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        ptxas = [triton.knobs.nvidia.ptxas.path, "--gpu-name=sm_90a", "--opt-level=0"]  # whether, not how well
        command = [*ptxas, source, "-o", source.with_suffix(".cubin")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stderr or "failed" if result.returncode else ""


def test_it_assembles(driven: list[dict[str, Any]]) -> None:
    """The cut PTX of every kernel is valid."""
    assert {row["operator"]: text for row in driven if (text := complaints(row["ptx"]))} == {}


def test_operators_without_a_kernel() -> None:
    """Only the sum over ranks, which TensorRT does itself."""
    assert [name for name, operator in OPERATORS.items() if kernel_digest(operator) == "none"] == ["AllReduce"]
