"""The experts' body holds one expert at a time: its memory does not grow with their number."""

import subprocess
import sys

import pytest
from support.sources import ROOT

# One layer's FP8 experts of 256 × 512; widened to f32 all at once, 400 of them would take 210 MB a projection.
MEASURE = """
import sys
import numpy as np, ml_dtypes, onnx_ir as ir, onnxruntime
from support.operators import Case, one_node_model, ort_value
from angelforge.exporter.measure import peak_memory
experts, width, hidden = int(sys.argv[1]), 256, 512
weight = np.ones((experts, width, hidden), ml_dtypes.float8_e4m3fn)
scale = np.ones((experts, 2, 4), np.float32)
choice = np.arange(experts, dtype=np.int32)[None, :]  # one token takes them all
bits = np.zeros((experts, 4), np.int32)
bits[:, 0] = 1
case = Case("Fp8MoEGateUp", (
    np.ones((1, hidden), ml_dtypes.float8_e4m3fn), np.ones((1, 4), np.float32),
    weight, scale, weight, scale, choice, bits), {})
model = ir.to_proto(one_node_model(case)).SerializeToString()
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
values = case.ort_values()
before = peak_memory()
session.run_with_ort_values(None, values)
print(peak_memory() - before)
"""


def growth(experts: int) -> int:
    """Bytes by which one call raises the peak memory of a fresh process."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(experts)],
        env={"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_is_that_of_one_expert() -> None:
    assert growth(400) < 40e6
