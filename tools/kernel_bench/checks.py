"""Numerics of every kernel against its function body, at sizes that a CPU follows, on fresh random inputs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from angelforge.config import ModelConfig
from angelforge.exporter.synthetic_config import small_config
from angelforge.plugins.kernel import Gpu, Tile
from angelforge.plugins.operator import Operator
from angelforge.plugins.tensorrt.kernels import find_kernel
from angelforge.plugins.tuning import tile_for
from angelforge.tools.kernel_bench.compare import Verdict, compare
from angelforge.tools.kernel_bench.costs import binding_of
from angelforge.tools.kernel_bench.inputs import make_inputs
from angelforge.tools.kernel_bench.truth import by_body
from angelforge.tools.kernel_bench.work import Sequences, Work, works

# Runs a call's kernel with a tile on copies of these inputs; gives the outputs, an aliased one with its changes.
Execute = Callable[[Work, Sequence[torch.Tensor], Tile], Sequence[torch.Tensor]]

PROFILES = {8: 5, 64: 40, 256: 130, 8192: 300}  # most tokens of the profile: tokens of the check
_DECODE = Sequences("decode", ((700, 1), (300, 3), (0, 0), (39, 1)))
_MIXED = Sequences("mixed", ((700, 1), (0, 70), (90, 30), (0, 0)))


@dataclass(frozen=True)
class BodyCheck:
    """One tile of one kernel against the body."""

    work: Work
    tile: Tile
    verdict: Verdict


def check_config() -> ModelConfig:
    """A small model with AntAngelMed's head size: every width a multiple of 128, so that FP8 groups are whole."""
    return ModelConfig.from_dict(small_config(head_dim=128, n_group=8, topk_group=4, num_experts=32))


def check_works(gpu: Gpu, operators: Sequence[str] = ()) -> Iterator[tuple[Work, Tile]]:
    """Each different tile of each kernel's profiles with a small call for it; of these operators, or of all."""
    seen = set()
    for most, tokens in PROFILES.items():
        contexts = (_DECODE,) if most == 8 else (_DECODE, _MIXED)
        for work in works(check_config(), (tokens,), contexts):
            if (operators and work.operator.name not in operators) or not has_kernel(work.operator):
                continue
            tile = tile_for(find_kernel(work.operator), binding_of(work).dims, gpu, most)
            key = (work.operator.name, work.label, tile)
            if key not in seen:
                seen.add(key)
                yield work, tile


def check_against_body(work: Work, tile: Tile, execute: Execute, seed: int, device: str) -> BodyCheck:
    """Runs one call and its body on the same inputs."""
    inputs = make_inputs(work, seed, device)
    wanted = by_body(work, inputs)
    return BodyCheck(work, tile, compare(work.operator, inputs, work.attributes, execute(work, inputs, tile), wanted))


def has_kernel(operator: Operator) -> bool:
    """Whether the operator's folder holds a kernel."""
    from angelforge.plugins.tensorrt.kernels import kernel_digest

    return kernel_digest(operator) != "none"
