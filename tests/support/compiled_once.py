"""A program: does launching a kernel find in Triton's cache what was compiled ahead? Prints what was compiled twice.

Its arguments are names of operators. Triton is told that there is an sm_90 GPU; nothing is launched.
"""

import sys
from pathlib import Path

import torch
import triton

from angelforge.plugins.compile import compile_kernel
from angelforge.plugins.kernel import Gpu
from angelforge.plugins.run_kernel import TORCH_TYPES, allocate
from angelforge.plugins.tensorrt.kernels import find_kernel
from angelforge.tools.kernel_bench.checks import check_config
from angelforge.tools.kernel_bench.costs import binding_of, port_shape, port_types
from angelforge.tools.kernel_bench.measure import default_tile
from angelforge.tools.kernel_bench.work import Sequences, works
from angelforge.tools.no_triton import launch_nothing

GPU = Gpu("sm_90", 132)


def compiled_twice(name: str, cache: Path) -> bool:
    """Whether a launch at 1 token, which Triton may treat in its own way, compiles again."""
    work = next(w for w in works(check_config(), (1,), (Sequences("few", ((9, 1),)),)) if w.operator.name == name)
    kernel, binding, tile = find_kernel(work.operator), binding_of(work), default_tile(work, GPU)
    compile_kernel(kernel, binding, tile, GPU.architecture)
    before = sorted(cache.iterdir())
    assert before
    ports = zip(work.operator.inputs, port_types(work), strict=True)
    inputs = [torch.empty(port_shape(work, port), dtype=TORCH_TYPES[kind], device="meta") for port, kind in ports]
    outputs = allocate(kernel, inputs, binding)
    extras = [int(binding.dims[symbol]) for symbol in kernel.extras]
    kernel.function.warmup(
        *inputs, *extras, *outputs, grid=(1,), **kernel.constants(binding.dims, binding.types, tile),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return sorted(cache.iterdir()) != before


if __name__ == "__main__":
    launch_nothing()
    folder = Path(triton.knobs.cache.dir)
    print(" ".join(name for name in sys.argv[1:] if compiled_twice(name, folder)))
