"""Three empty libraries over which the real Python bindings of TensorRT 11 can be imported, to see their names."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")
# What the bindings import from them (`nm -D`).
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


def empty_tensorrt(folder: Path) -> Path:
    """Compiles the libraries into `folder`; skips the test, with the reason, where that cannot be done."""
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("needs the Python bindings of TensorRT 11: pip install tensorrt-cu13-bindings")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler to make empty libraries for the bindings of TensorRT 11")
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for name in LIBRARIES:
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source]
        subprocess.run(command, check=True)
    return folder
