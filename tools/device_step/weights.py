"""Random weights of a graph, made on the device: names, types and shapes are those of its initializers.

Values are of a trained model's scale, so that a step stays finite through all layers, experts are chosen nearly evenly
and a GPU draws about the power that real weights cost: normal values, products that keep a deviation near 1.
"""

from collections.abc import Mapping

import onnx_ir as ir
import torch

from angelforge.exporter.layout import SCALE
from angelforge.plugins.run_kernel import TORCH_TYPES

CODE = 64.0  # standard deviation of e4m3 codes: 448, the largest, is seven of them
PIECE = 1 << 26  # values that are made at once: 256 MB in f32, whatever the size of a weight

Weights = dict[str, torch.Tensor]


def empty_weights(model: ir.Model, device: str) -> Weights:
    """Uninitialised memory for every initializer; on the device "meta" none at all, for counting."""
    found = {}
    for name, value in model.graph.initializers.items():
        assert value.dtype is not None and value.shape is not None
        found[name] = torch.empty(tuple(value.shape.numpy()), dtype=TORCH_TYPES[value.dtype], device=device)
    return found


def fill_weights(weights: Weights, rope_theta: float, seed: int) -> None:
    """Gives every weight its values, one piece after another; `PIECE` f32 are all the memory that it needs beside."""
    device = next(iter(weights.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    largest = max(weight.numel() for weight in weights.values())
    scratch = torch.empty(min(PIECE, largest), dtype=torch.float32, device=device)
    for name, weight in weights.items():
        if name.startswith("rope."):
            weight.copy_(_rope_table(weight, rope_theta, name))
        elif name.endswith("expert_bias"):
            weight.zero_()
        elif name.endswith(SCALE):
            deviation = weights[name.removesuffix(SCALE)].shape[-1] ** -0.5
            weight.uniform_(0.75, 1.25, generator=generator).mul_(deviation / CODE)
        else:
            mean, deviation = _distribution(name, weight)
            fill_normal(weight, mean, deviation, generator, scratch)


def fill_normal(
    tensor: torch.Tensor, mean: float, deviation: float, generator: torch.Generator, scratch: torch.Tensor
) -> None:
    """Normal values, rounded to the tensor's type, finite in e4m3; `scratch` f32 [n] is where they are made."""
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), scratch.numel()):
        part = flat[start : start + scratch.numel()]
        values = scratch[: part.numel()].normal_(mean, deviation, generator=generator)
        if tensor.dtype == torch.float8_e4m3fn:
            values.clamp_(-448.0, 448.0)
        part.copy_(values)


def nbytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of all of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _distribution(name: str, weight: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a weight's values."""
    if weight.dtype == torch.float8_e4m3fn:
        return 0.0, CODE
    if weight.dim() == 1:  # norms
        return 1.0, 0.1
    if name.endswith("word_embeddings.weight"):
        return 0.0, 1.0
    return 0.0, float(weight.shape[-1]) ** -0.5


def _rope_table(table: torch.Tensor, theta: float, name: str) -> torch.Tensor:
    """cos or sin [positions, pairs] of position · theta^(−pair / pairs): rows that a real table has, unstretched."""
    positions, pairs = table.shape
    exponents = torch.arange(pairs, dtype=torch.float64, device=table.device) / pairs
    angles = torch.arange(positions, dtype=torch.float64, device=table.device)[:, None] * theta**-exponents
    return angles.cos() if name == "rope.cos" else angles.sin()
