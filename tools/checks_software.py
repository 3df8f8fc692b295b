"""What `doctor` looks at in software: Python, the project's packages, ONNX Runtime, TensorRT and other extras."""

import json
import platform
import sys

from angelforge.tools.finding import Finding, installed, probe, requirements

MAIN_JOB = "export, build --target cpu, run"

# Runs a graph of the opset that the CPU engine needs at least: proves the libraries, not only that they are installed.
_RUN_A_GRAPH = """
import json, numpy, onnx, onnxruntime
from onnx import TensorProto, helper
value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])
graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", [value("x")], [value("y")])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
assert session.run(None, {"x": numpy.float32([2])})[0][0] == 4
print(json.dumps([onnxruntime.__version__, onnxruntime.get_available_providers()]))
"""


def check_python() -> Finding:
    """Which Python this is (an older one than 3.10 does not get here), and where its packages are."""
    return Finding("Python", "ok", f"{platform.python_version()} at {sys.prefix}")


def check_packages() -> list[Finding]:
    """Each package that the project depends on: whether it is installed, in a version that is known to work."""
    findings = []
    for wanted in requirements():
        found = installed(wanted.name)
        fix = f"{sys.executable} -m pip install '{wanted.name}{wanted.specifier}'"
        if found is None:
            findings.append(Finding(wanted.name, "missing", "not installed", MAIN_JOB, fix, needed=True))
        elif not wanted.specifier.contains(found, prereleases=True):
            text = f"{found}, wanted {wanted.specifier}"
            findings.append(Finding(wanted.name, "problem", text, "relying on results: not tested together", fix))
        else:
            findings.append(Finding(wanted.name, "ok", found, needed=True))
    return findings


def check_onnxruntime() -> Finding:
    """ONNX Runtime runs a graph; its providers."""
    name = "ONNX Runtime runs a graph"
    if (installed("onnxruntime") or installed("onnxruntime-gpu")) is None:
        fix = "Install the missing package named above."
        return Finding(name, "missing", "not installed", MAIN_JOB, fix, needed=True)
    worked, said = probe(_RUN_A_GRAPH)
    if not worked:
        fix = "Install onnxruntime-gpu, onnx and numpy again in the versions of constraints.txt."
        return Finding(name, "problem", said, MAIN_JOB, fix, needed=True)
    version, providers = json.loads(said)
    return Finding(name, "ok", f"{version} with {', '.join(providers)}", needed=True)


def check_one_onnxruntime() -> Finding:
    """`onnxruntime` and `onnxruntime-gpu` hold the same files; with both, one has overwritten half of the other."""
    name = "one ONNX Runtime only"
    if installed("onnxruntime") is None or installed("onnxruntime-gpu") is None:
        return Finding(name, "ok", "yes")
    fix = f"{sys.executable} -m pip uninstall -y onnxruntime onnxruntime-gpu, then install onnxruntime-gpu"
    found = "onnxruntime and onnxruntime-gpu are both installed"
    return Finding(name, "problem", found, "relying on ONNX Runtime: their files overwrite each other", fix)


def check_tensorrt() -> Finding:
    """TensorRT 11, which builds engines for H20 and H200."""
    prevents = "building and running TensorRT engines (H20, H200)"
    fix = "pip install '.[tensorrt]' in the project's folder; its libraries come from NVIDIA's own package index"
    return _check_library("TensorRT", "tensorrt", ("tensorrt", "tensorrt-cu13-bindings"), prevents, fix)


def check_tensorrt_rtx() -> Finding:
    """TensorRT for RTX, which builds engines for RTX cards, also on a machine without a GPU."""
    prevents = "building engines for RTX cards"
    fix = "pip install '.[rtx]' in the project's folder"
    return _check_library("TensorRT-RTX", "tensorrt_rtx_bindings", ("tensorrt-rtx-cu13-bindings",), prevents, fix)


def check_extras() -> list[Finding]:
    """What is of use in some tasks only."""
    findings = []
    for extra, prevents in (
        ("serve", "serve"),
        ("torch", "running TensorRT engines, comparing with torch"),
        ("triton", "compiling and testing GPU kernels"),
    ):
        for wanted in requirements(extra):
            found, fix = installed(wanted.name), f"pip install '.[{extra}]' in the project's folder"
            if found is None:
                findings.append(Finding(wanted.name, "missing", "not installed", prevents, fix))
            elif not wanted.specifier.contains(found, prereleases=True):
                text = f"{found}, wanted {wanted.specifier}"
                findings.append(Finding(wanted.name, "problem", text, "relying on results: not tested together", fix))
            else:
                findings.append(Finding(wanted.name, "ok", found))
    return findings


def _check_library(name: str, module: str, distributions: tuple[str, ...], prevents: str, fix: str) -> Finding:
    if not any(installed(distribution) for distribution in distributions):
        return Finding(name, "missing", "not installed", prevents, fix)
    worked, said = probe(f"import {module} as library; print(library.__version__)")
    return Finding(name, "ok", said) if worked else Finding(name, "problem", said, prevents, fix)
