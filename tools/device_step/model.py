"""A model's graph with random weights, and a pool of random keys and values, on one device."""

from collections.abc import Sequence

import torch

from angelforge.engines.decode_limit import decode_limit
from angelforge.engines.footprint import kv_bytes_per_token, weight_bytes
from angelforge.exporter.graph import build_graph
from angelforge.exporter.parts import onnx_type
from angelforge.plugins.kernel import Gpu
from angelforge.plugins.run_kernel import TORCH_TYPES
from angelforge.tools.device_step.executor import StepGraph
from angelforge.tools.device_step.memory import PAGE_SIZE, Subject
from angelforge.tools.device_step.sequences import Case, decode_batch, on_device
from angelforge.tools.device_step.weights import PIECE, empty_weights, fill_normal, fill_weights


class DeviceModel:
    """Ready to step."""

    def __init__(self, subject: Subject, cases: Sequence[Case], gpu: Gpu, device: str) -> None:
        """The pool is large enough for each of the cases.

        Raises:
            AngelForgeError: triton is missing.
            torch.cuda.OutOfMemoryError: `memory.fit` was not asked, or memory was lost since.
        """
        self.subject, self.device = subject, device
        config = subject.config
        model = build_graph(config, subject.precision, PAGE_SIZE, subject.max_context)
        self.graph = StepGraph(model, gpu)
        self.weights = empty_weights(model, device)
        fill_weights(self.weights, config.rope_theta, subject.seed)
        pages = max(case.pages(PAGE_SIZE) for case in cases)
        dtype = TORCH_TYPES[onnx_type(subject.precision.activation)]
        shape = (pages, 2, config.num_key_value_heads, PAGE_SIZE, config.head_dim)
        self.pools = {
            f"kv_cache.{layer}": torch.empty(shape, dtype=dtype, device=device)
            for layer in range(config.num_hidden_layers)
        }
        fill_pools(list(self.pools.values()), subject.seed)

    def values(self, case: Case) -> dict[str, torch.Tensor]:
        """Everything that a step of the case reads, by the graph's names."""
        batch = decode_batch(self.subject.config, case, PAGE_SIZE, self.subject.seed)
        return {**self.weights, **self.pools, **on_device(batch, self.device)}


def fill_pools(pools: Sequence[torch.Tensor], seed: int) -> None:
    """Normal keys and values, finite everywhere."""
    generator = torch.Generator(pools[0].device).manual_seed(seed + 1)
    scratch = torch.empty(min(PIECE, pools[0].numel()), dtype=torch.float32, device=pools[0].device)
    for pool in pools:
        fill_normal(pool, 0.0, 1.0, generator, scratch)


def step_bytes(subject: Subject, case: Case, experts: Sequence[int]) -> int:
    """Bytes that a step must read: the planner's count, with so many different routed experts of each MoE layer.

    Where none are told, as many as random routing reaches.
    """
    config, precision = subject.config, subject.precision
    weights = weight_bytes(config, precision, subject.max_context)
    kv = kv_bytes_per_token(config, precision.activation)
    mean = sum(experts) / len(experts) if experts else None
    return decode_limit(config, weights, kv, 1.0, case.batch, case.context, experts=mean).bytes_per_step
