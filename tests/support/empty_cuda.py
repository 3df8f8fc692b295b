"""CUDA libraries that compute nothing, over which ONNX Runtime's real CUDA provider starts without a GPU.

It takes its nodes and places memory as on a GPU; memory is the host's, so copies are real. No kernel can be launched.
"""

import re
import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest

_PROVIDER = Path(onnxruntime.__file__).parent / "capi/libonnxruntime_providers_cuda.so"
_CUDA = re.compile(r"^(cuda|cublas|curand|cudnn|cufft|cu[A-Z]|__cuda)\w+$")
_FIXED = """
#include <stdlib.h>
#include <string.h>
static void *some[64];
static int allocate(void **to, size_t size) { return posix_memalign(to, 4096, size ? size : 256) ? 2 : 0; }
static int handle(void **to) { *to = some; return 0; }
static int put(int *to, int value) { *to = value; return 0; }
int cudaMalloc(void **to, size_t size) { return allocate(to, size); }
int cudaMallocHost(void **to, size_t size) { return allocate(to, size); }
int cudaHostAlloc(void **to, size_t size, unsigned flags) { return allocate(to, size); }
int cudaFree(void *at) { free(at); return 0; }
int cudaFreeHost(void *at) { free(at); return 0; }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { memcpy(to, from, size); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *s) { memcpy(to, from, size); return 0; }
int cudaMemset(void *to, int value, size_t size) { memset(to, value, size); return 0; }
int cudaMemsetAsync(void *to, int value, size_t size, void *s) { memset(to, value, size); return 0; }
int cudaMemGetInfo(size_t *left, size_t *all) { *left = *all = 16ull << 30; return 0; }
int cudaGetDeviceCount(int *to) { return put(to, 1); }
int cudaGetDevice(int *to) { return put(to, 0); }
int cudaDriverGetVersion(int *to) { return put(to, 13000); }
int cudaRuntimeGetVersion(int *to) { return put(to, 13000); }
int cudaDeviceGetAttribute(int *to, int which, int device) { return put(to, which == 75 ? 9 : which == 76 ? 0 : 64); }
int cudaGetDeviceProperties(char *to, int device) { memset(to, 0, 512); return 0; }
int cudaStreamIsCapturing(void *stream, int *to) { return put(to, 0); }
int cudaStreamCreate(void **to) { return handle(to); }
int cudaStreamCreateWithFlags(void **to) { return handle(to); }
int cudaEventCreate(void **to) { return handle(to); }
int cudaEventCreateWithFlags(void **to) { return handle(to); }
int cublasCreate_v2(void **to) { return handle(to); }
int cublasLtCreate(void **to) { return handle(to); }
const char *cudaGetErrorString(int error) { return "empty"; }
const char *cudaGetErrorName(int error) { return "empty"; }
void **__cudaRegisterFatBinary(void *binary) { return some; }
"""


def empty_cuda(folder: Path) -> Path:
    """Compiles the libraries into `folder`, for LD_LIBRARY_PATH; skips the test where that cannot be done."""
    if not _PROVIDER.exists():
        pytest.skip("needs onnxruntime-gpu")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not (shutil.which("nm") and shutil.which("readelf")):
        pytest.skip("needs a C compiler, nm and readelf to make empty libraries for the CUDA provider")
    wanted = _lines("nm", "-D", "--undefined-only", str(_PROVIDER))
    names = {line.split()[-1].partition("@")[0] for line in wanted}
    given = set(re.findall(r"(\w+)\([^)]*\) \{", _FIXED))
    empty = [f"int {name}() {{ return 0; }}" for name in sorted(names) if _CUDA.match(name) and name not in given]
    source = folder / "empty.c"
    source.write_text("\n".join([_FIXED, *empty]))
    needed = re.findall(r"\[(libcu\w+\.so\.\d+)\]", "\n".join(_lines("readelf", "-d", str(_PROVIDER))))
    built = folder / "empty.so"
    subprocess.run([compiler, "-w", "-shared", "-fPIC", "-o", str(built), str(source)], check=True)
    for name in needed:
        shutil.copy(built, folder / name)
    return folder


def _lines(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
