"""What the project uses of TensorRT exists in the real TensorRT 11.4 with the signature that TensorRT-RTX has.

TensorRT 11 itself cannot be installed here, its Python bindings can: over three empty libraries they tell every name.
"""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support import tensorrt_on_cpu
from support.empty_tensorrt import empty_tensorrt
from support.sources import ROOT
from support.tensorrt import rtx

PROGRAM = ROOT / "tests" / "support" / "api_names.py"
FILES = [
    *sorted((ROOT / "plugins" / "tensorrt").glob("*.py")),
    *sorted((ROOT / "engines").glob("tensorrt_*.py")),
    ROOT / "engines" / "preflight.py",
    # The others call these.
    *(ROOT / "runtime" / f"tensorrt_{name}.py" for name in ("session", "bindings", "ranks")),
]
DEEP = ROOT / "tools" / "deep_steps.py"  # loads plans with TensorRT itself

# Only TensorRT for RTX builds for a named architecture, and only TensorRT 11 has ahead-of-time plugins. The code that
# uses either asks first which library it has.
ENUM = {"name", "value", "__members__"}  # what every enumeration has
RTX_ONLY = {"ComputeCapability", "set_compute_capability", "num_compute_capabilities", "REQUIRE_USER_ALLOCATION"}
TENSORRT_ONLY = {"PREFER_AOT_PYTHON_PLUGINS"}


def names_of(module: str, libraries: Path | None) -> dict[str, dict[str, str]]:
    environment = dict(os.environ) | ({"LD_LIBRARY_PATH": str(libraries)} if libraries else {})
    command = [sys.executable, str(PROGRAM), module]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    found: dict[str, dict[str, str]] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def eleven(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    return names_of("tensorrt_bindings", empty_tensorrt(tmp_path_factory.mktemp("tensorrt")))


@pytest.fixture(scope="module")
def for_rtx() -> dict[str, dict[str, str]]:
    return names_of(rtx().api.__name__, None)


def attributes_used(files: Sequence[Path] = (*FILES, DEEP)) -> set[str]:
    """Every name that stands behind a dot, or is defined as a method (TensorRT's callbacks), in the files."""
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.FunctionDef):
                found.add(node.name)
    return found - {"__init__", "__name__", "__dict__", "__doc__"}


def uses(api: dict[str, dict[str, str]]) -> dict[tuple[str, str], str]:
    """(class, attribute) of an API that the files may mean by the names they use, with signatures."""
    names = attributes_used()
    return {
        (kind, name): text
        for kind, members in api.items()
        for name, text in members.items()
        if name in names and not ("__members__" in members and name in ENUM)
    }


def test_all_of_it_is_in_tensorrt_11(for_rtx: Any, eleven: Any) -> None:
    """Names, and where they are functions also their arguments and results."""
    used = {key: text for key, text in uses(for_rtx).items() if not RTX_ONLY & set(key)}
    assert len(used) > 60
    named = attributes_used()
    used = {(kind, name): text for (kind, name), text in used.items() if kind in eleven or kind in named}
    missing = [f"{kind}.{name}" for kind, name in used if name not in eleven.get(kind, {})]
    assert missing == []
    different = {
        f"{kind}.{name}": (text, eleven[kind][name])
        for (kind, name), text in used.items()
        if not set(text.splitlines()) <= set(eleven[kind][name].splitlines())  # which may have more overloads
    }
    # Ahead-of-time plugins get a word more in TensorRT 11; NVIDIA's own classes take it.
    assert set(different) == {"IPluginCreatorV3Quick.create_plugin"}, different


def test_all_of_it_is_in_tensorrt_rtx(for_rtx: Any, eleven: Any) -> None:
    """The one code path serves both: what is used of TensorRT 11 is in TensorRT for RTX too, but for what differs."""
    missing = {name for kind, name in uses(eleven) if kind in for_rtx and name not in for_rtx[kind]}
    assert missing == TENSORRT_ONLY


@pytest.mark.parametrize("kind", ["Runtime", "ICudaEngine", "IExecutionContext"])
def test_the_stand_in_is_called_as_tensorrt_is(for_rtx: Any, eleven: Any, kind: str) -> None:
    """What tests of the runtime use in TensorRT's place has its methods, with its names of arguments in its order."""
    classes = vars(tensorrt_on_cpu) | vars(tensorrt_on_cpu.make_library(()).api)
    methods = {name: member for name, member in vars(classes[kind]).items() if name[0] != "_"}
    called = {name: member for name, member in methods.items() if name in attributes_used(FILES)}
    assert called
    for name, member in called.items():
        for library in (for_rtx, eleven):
            assert name in library[kind]
            if inspect.isfunction(member):
                ours = list(inspect.signature(member).parameters)
                theirs = [re.findall(r"(?:\(|, )(\w+): ", line) for line in library[kind][name].splitlines()]
                assert ours in theirs, (name, theirs)


def test_what_differs_differs(for_rtx: Any, eleven: Any) -> None:
    assert "ComputeCapability" in for_rtx
    assert "ComputeCapability" not in eleven
    assert "IPluginV3QuickAOTBuild" in eleven
    assert "IPluginV3QuickAOTBuild" not in for_rtx


@pytest.mark.parametrize(
    ("kind", "members"),
    [
        ("BuilderFlag", ["TF32"]),
        ("PreviewFeature", ["ALIASED_PLUGIN_IO_10_03"]),
        ("ProfilingVerbosity", ["DETAILED"]),
        ("DimensionOperation", ["SUM", "PROD", "FLOOR_DIV"]),
        ("TensorFormat", ["LINEAR"]),
        ("PluginFieldType", ["INT64", "FLOAT32"]),
        ("DataType", ["FLOAT", "HALF", "BF16", "FP8", "INT32", "INT64", "INT8", "UINT8", "BOOL"]),
        ("NetworkDefinitionCreationFlag", ["PREFER_AOT_PYTHON_PLUGINS"]),
        ("LayerType", ["PLUGIN_V3", "DIST_COLLECTIVE"]),
        ("TensorIOMode", ["INPUT", "OUTPUT"]),
        ("ExecutionContextAllocationStrategy", ["USER_MANAGED"]),
    ],
)
def test_enums(eleven: Any, kind: str, members: list[str]) -> None:
    """Members that code names by strings."""
    assert set(members) <= set(eleven[kind])


@pytest.mark.parametrize(
    ("kind", "method", "arguments"),
    [
        ("IPluginV3OneBuildV2", "get_aliased_input", 1),
        ("Builder", "create_network", 2),
        ("OnnxParser", "parse", 3),
        ("IOptimizationProfile", "set_shape", 5),
        ("IBuilderConfig", "set_preview_feature", 3),
        ("IBuilderConfig", "set_timing_cache", 3),
        ("IBuilderConfig", "create_timing_cache", 2),
        ("IPluginRegistry", "get_creator", 4),
        ("IExecutionContext", "set_optimization_profile_async", 3),
        ("IExecutionContext", "set_device_memory", 3),
        ("IExecutionContext", "set_tensor_address", 3),
        ("IExecutionContext", "execute_async_v3", 2),
        ("ICudaEngine", "get_device_memory_size_for_profile_v2", 2),
        ("ICudaEngine", "get_tensor_mode", 2),
    ],
)
def test_signatures_are_seen(eleven: Any, kind: str, method: str, arguments: int) -> None:
    """The comparison above really has signatures to compare."""
    assert eleven[kind][method].count(": ") == arguments
