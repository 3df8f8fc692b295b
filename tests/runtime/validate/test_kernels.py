"""The kernels under test: Triton inside the graph, on the values that the judge gives them."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.built import make_bundle

from angelforge.bundle import Bundle
from angelforge.errors import AngelForgeError
from angelforge.exporter.export import ExportOptions
from angelforge.precision import Precision
from angelforge.runtime.validate import kernel_graph
from angelforge.runtime.validate.compare import Finding, Scene, compare_operation, first_failure
from angelforge.runtime.validate.data import Schedule, schedule
from angelforge.runtime.validate.kernel_graph import KernelGraph
from angelforge.runtime.validate.operations import judge_graph
from angelforge.runtime.validate.runners import JudgeRunner, KernelRunner
from angelforge.runtime.validate.thresholds import thresholds
from angelforge.runtime.validate.walk import as_given, walk
from angelforge.runtime.validate.whole import compare_whole

SIZES = {"num_hidden_layers": 2, "vocab_size": 264, "hidden_size": 128, "moe_intermediate_size": 64}
SIZES |= {"num_attention_heads": 2, "intermediate_size": 128}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A very small model in FP8: the interpreter is slow."""
    options = ExportOptions(precision=Precision.FP8)
    return make_bundle(tmp_path_factory.mktemp("kernels"), SIZES, options)[1]


def packed(bundle: Bundle) -> Schedule:
    return schedule([[3, 5, 7]], page_size=64, vocab_size=264, max_context=bundle.manifest.max_context, padding=1)


def compare(bundle: Bundle, kinds: set[str], replaced: dict[str, Any] | None = None) -> list[Finding]:
    """Those operators of layer 1, with the judge's inputs as the bundle stores them."""
    judge, candidate, planned = judge_graph(bundle, as_stored=True), KernelGraph(bundle, replaced), packed(bundle)
    found: list[Finding] = []
    for call in walk(judge, bundle, planned):
        if call.stage.layer != 1:
            continue
        scene = Scene(judge, planned.steps[0].batch, thresholds(Precision.FP8, as_stored=True), 0)
        chosen = [operation for operation in call.stage.operations if operation.kind in kinds]
        for unit in candidate.units(chosen, whole=False):
            results = unit.piece.run(as_given(call.values, judge, as_stored=True))
            found += compare_operation(unit.operations[0], results, call.values, scene)
    return found


def test_kernels_in_the_graph_agree_with_the_judge(bundle: Bundle) -> None:
    """The norm, which rounds three times, to the last bit; the router's two kernels."""
    found = compare(bundle, {"AddNormQuantize", "MoELogits", "MoERoute"})
    assert first_failure(found) is None
    assert [f.error for f in found if f.operator == "AddNormQuantize"] == [0.0] * 6
    assert {finding.operator for finding in found} == {"AddNormQuantize", "MoELogits", "MoERoute"}


def test_tf32_in_the_routers_kernel_is_located(bundle: Bundle) -> None:
    """A kernel that multiplies values of 11 significant bits, as Triton does with f32 unless told otherwise."""

    def tf32(array: np.ndarray) -> np.ndarray:
        bits = array.astype(np.float32).view(np.uint32)
        return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)

    def launch(inputs: Any, attributes: Any) -> tuple[np.ndarray, ...]:
        hidden, weight = (tf32(array) for array in inputs)
        return ((hidden @ weight.T).astype(np.float32),)

    found = first_failure(compare(bundle, {"MoELogits"}, {"MoELogits": launch}))
    assert found is not None
    assert (found.place, found.operator) == ("layer 1", "MoELogits")


def test_the_product_rounds_as_a_gpu_does(bundle: Bundle) -> None:
    """bf16 sums at the middle of two values go to the even one, which Triton's interpreter alone would truncate."""
    launch = kernel_graph._launcher()
    one, half_step = (np.full((1, 128), value, ml_dtypes.bfloat16) for value in (1.0078125, 0.00390625))
    total, _ = launch("AddNorm", (one, half_step, one[0]), {"epsilon": 1e-6})
    assert float(total[0, 0]) == 1.015625


def test_f32_bundles_have_no_kernels(tmp_path: Path) -> None:
    _, exact = make_bundle(tmp_path, {**SIZES, "num_hidden_layers": 1}, ExportOptions(precision=Precision.FP32))
    with pytest.raises(AngelForgeError, match="--precision bf16 or fp8"):
        KernelGraph(exact)


@pytest.mark.full
def test_the_whole_model_on_kernels(bundle: Bundle) -> None:
    """Logits of a real forward pass, end to end, in Polygraphy's Comparator."""
    planned = packed(bundle)
    judge = JudgeRunner(bundle, planned.num_pages, as_stored=True)
    limits = thresholds(Precision.FP8, as_stored=True)
    found = compare_whole(judge, KernelRunner(bundle, planned.num_pages), planned, limits)
    assert found.summary()["mean_kl"] < 0.05
    assert found.summary()["cosine"] > 0.98
