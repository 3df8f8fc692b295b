"""The machines that AngelForge builds for: one row each. A new target is a new row.

Memory is what the driver shows, bandwidths and FLOP rates are the vendor's nominal figures (dense, f32 accumulation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from angelforge.errors import UsageError

Backend = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True)
class Target:
    """One kind of device. None where a figure depends on the machine (`cpu`, and `cuda`: any NVIDIA GPU)."""

    name: str
    architecture: str  # "sm_90" and so on, "cpu", or "cuda" for any GPU
    memory_bytes: int | None
    bandwidth: float | None  # memory, bytes/s
    sms: int | None
    bf16_flops: float | None  # FLOP/s
    fp8_flops: float | None
    link_bandwidth: float | None  # to other devices, bytes/s in one direction: NVLink, else PCIe
    backend: Backend

    @property
    def device(self) -> str:
        """What torch calls such a device."""
        return "cpu" if self.architecture == "cpu" else "cuda"

    def check_ranks(self, ranks: int) -> None:
        """Raises UsageError where so many devices of this kind cannot share a model."""
        if ranks > 1 and self.backend == "onnxruntime" and self.device != "cpu":
            raise UsageError(
                f"{ranks} ranks were asked for, but target {self.name} runs on one GPU. Leave --tensor-parallel out, "
                "or take a target that TensorRT builds for."
            )


_TRT: Backend = "tensorrt"
_RTX: Backend = "tensorrt-rtx"
_NVLINK, _PCIE4, _PCIE5 = 450e9, 32e9, 64e9

# The 141 GB variant of the H20 has the H200's memory. Memory: MiB of nvidia-smi × 2²⁰, rounded down.
_ROWS = (
    Target("cpu", "cpu", None, None, None, None, None, None, "onnxruntime"),
    Target("cuda", "cuda", None, None, None, None, None, None, "onnxruntime"),
    Target("h20", "sm_90", 102_600_000_000, 4.0e12, 78, 148e12, 296e12, _NVLINK, _TRT),
    Target("h20-141g", "sm_90", 150_700_000_000, 4.8e12, 78, 148e12, 296e12, _NVLINK, _TRT),
    Target("h100", "sm_90", 85_500_000_000, 3.35e12, 132, 989e12, 1979e12, _NVLINK, _TRT),
    Target("h200", "sm_90", 150_700_000_000, 4.8e12, 132, 989e12, 1979e12, _NVLINK, _TRT),
    Target("l20", "sm_89", 48_300_000_000, 864e9, 92, 119.5e12, 239e12, _PCIE4, _RTX),
    Target("rtx4090", "sm_89", 25_700_000_000, 1.008e12, 128, 165.2e12, 330.3e12, _PCIE4, _RTX),
    Target("rtx5090", "sm_120", 34_100_000_000, 1.792e12, 170, 209.5e12, 419e12, _PCIE5, _RTX),
)

TARGETS: Mapping[str, Target] = MappingProxyType({row.name: row for row in _ROWS})


def get_target(name: str) -> Target:
    """The target of that name; raises UsageError naming the known ones."""
    target = TARGETS.get(name)
    if target is None:
        raise UsageError(f"There is no target {name!r}; the targets are {', '.join(TARGETS)}.")
    return target
