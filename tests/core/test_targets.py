"""The table of targets."""

import pytest

from angelforge.errors import UsageError
from angelforge.targets import TARGETS, get_target


def test_rows_are_plausible() -> None:
    """Names are keys; GPUs have all figures; FP8 is twice bf16 within rounding; ONNX Runtime's targets have none."""
    for name, target in TARGETS.items():
        assert target.name == name
        figures = (target.memory_bytes, target.bandwidth, target.sms, target.bf16_flops, target.link_bandwidth)
        if name in ("cpu", "cuda"):
            assert (set(figures), target.backend, target.device) == ({None}, "onnxruntime", name)
            continue
        assert all(figure is not None and figure > 0 for figure in figures)
        assert target.architecture.startswith("sm_")
        assert target.fp8_flops is not None
        assert target.bf16_flops is not None
        assert target.fp8_flops == pytest.approx(2 * target.bf16_flops, rel=0.01)


def test_the_h20_of_the_platform_page() -> None:
    """96 GB (102.6·10⁹ B visible), 4.0 TB/s, 78 SMs, 148 and 296 TFLOP/s."""
    h20 = get_target("h20")
    assert (h20.memory_bytes, h20.bandwidth, h20.sms) == (102_600_000_000, 4.0e12, 78)
    assert (h20.bf16_flops, h20.fp8_flops, h20.architecture, h20.backend) == (148e12, 296e12, "sm_90", "tensorrt")


def test_an_unknown_target_names_the_known_ones() -> None:
    """Wrong use, with the list."""
    with pytest.raises(UsageError, match=r"'h21'.*cpu, cuda, h20, h20-141g"):
        get_target("h21")
