"""Compiles a step's kernels before the GPU is asked for anything: many at once, in processes of their own.

Triton's disk cache then has them when the step is launched: `plugins.compile` asks it for what a launch asks for.
"""

from collections.abc import Callable, Sequence

import torch

from angelforge.exporter.graph import build_graph
from angelforge.exporter.parts import onnx_type
from angelforge.plugins.kernel import Gpu, Tile
from angelforge.plugins.registry import OPERATORS
from angelforge.plugins.run_kernel import TORCH_TYPES
from angelforge.tools.device_step.executor import StepGraph
from angelforge.tools.device_step.memory import PAGE_SIZE, Subject
from angelforge.tools.device_step.sequences import Case, decode_batch, on_device
from angelforge.tools.device_step.weights import empty_weights
from angelforge.tools.kernel_bench.failures import LAUNCH_ERRORS, reason
from angelforge.tools.kernel_bench.measure import default_tile
from angelforge.tools.kernel_bench.warm import compile_tiles
from angelforge.tools.kernel_bench.work import Work


def precompile(subject: Subject, cases: Sequence[Case], gpu: Gpu, say: Callable[[str], None]) -> None:
    """Compiles all tiles of these cases' steps. What fails here is told: the launch will say it again."""
    tiles = step_tiles(subject, cases, gpu)
    say(f"Compiling {len(tiles)} kernels …")
    try:
        codes = compile_tiles(tiles, gpu.architecture)
    except LAUNCH_ERRORS as error:  # the processes, not a kernel
        say(f"Kernels could not be compiled ahead: {reason(error)}. They are at their first launch, one by one.")
        return
    for (work, tile), code in zip(tiles, codes, strict=True):
        if code.problem:
            say(f"{work.name}, {tile} cannot be compiled: {code.problem}")


def step_tiles(subject: Subject, cases: Sequence[Case], gpu: Gpu) -> list[tuple[Work, Tile]]:
    """Every kernel with its sizes and tile that a step of one of the cases launches, each once; no memory is taken."""
    model = build_graph(subject.config, subject.precision, PAGE_SIZE, subject.max_context)
    graph, weights, config = StepGraph(model, gpu), empty_weights(model, "meta"), subject.config
    dtype = TORCH_TYPES[onnx_type(subject.precision.activation)]
    found: dict[object, tuple[Work, Tile]] = {}
    for case in cases:
        shape = (case.pages(PAGE_SIZE), 2, config.num_key_value_heads, PAGE_SIZE, config.head_dim)
        pool = torch.empty(shape, dtype=dtype, device="meta")
        pools = {f"kv_cache.{layer}": pool for layer in range(config.num_hidden_layers)}
        batch = on_device(decode_batch(config, case, PAGE_SIZE, subject.seed), "meta")
        for call in graph.walk({**weights, **pools, **batch}, launching=False):
            if call.launch is None or call.operator not in OPERATORS:
                continue
            operator = OPERATORS[call.operator]
            dims = operator.bind([tuple(tensor.shape) for tensor in call.inputs])
            work = Work(operator, "", dims, call.attributes)
            tile = default_tile(work, gpu)
            key = operator.name, tuple(sorted(work.sizes().items())), tuple(sorted(call.attributes.items())), tile
            found.setdefault(key, (work, tile))
    return list(found.values())
