"""The exported file is plain ONNX: the checker, the reference evaluator and Polygraphy take it as it is."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from support.built import make_bundle, relative_error

from angelforge.bundle import Bundle
from angelforge.config import ModelConfig
from angelforge.exporter.export import ExportOptions
from angelforge.exporter.graph import build_graph
from angelforge.exporter.layout import bundle_tensors
from angelforge.exporter.synthetic import FULL_CONFIG, small_config
from angelforge.plugins.operator import DOMAIN
from angelforge.precision import Precision
from angelforge.runtime.validate.reference import load_reference

FP8_CONFIG = {
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """(checkpoint, bundle) in f32."""
    return make_bundle(tmp_path_factory.mktemp("graph"), options=ExportOptions(precision=Precision.FP32))


def inputs(config: ModelConfig, ids: list[int]) -> dict[str, np.ndarray]:
    """The graph's inputs for one sequence in page 1."""
    count = len(ids)
    pool = np.zeros((3, 2, config.num_key_value_heads, 64, config.head_dim), np.float32)
    return {
        "input_ids": np.array(ids),
        "positions": np.arange(count, dtype=np.int32),
        "num_tokens": np.array([count], np.int32),
        "query_start": np.array([0, count], np.int32),
        "kv_length": np.array([count], np.int32),
        "page_table": np.array([[1, 0]], np.int32),
        "slots": np.arange(64, 64 + count, dtype=np.int32),
        "logit_indices": np.arange(count),
        **{f"kv_cache.{layer}": pool for layer in range(config.num_hidden_layers)},
    }


@pytest.mark.parametrize("precision", Precision)
def test_the_graph_passes_the_checker_with_strict_shape_inference(precision: Precision) -> None:
    overrides = FP8_CONFIG if precision.quantized else {}
    config = ModelConfig.from_dict(small_config(**overrides))
    model = build_graph(config, precision, 64, 512)
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(np.zeros(tuple(value.shape), value.dtype.numpy()), value.dtype, name=value.name)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    assert [d.dim_param or d.dim_value for d in inferred.graph.output[0].type.tensor_type.shape.dim] == ["R", 1024]
    assert proto.ir_version <= 13
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 24, DOMAIN: 1}


@pytest.mark.parametrize("precision", Precision)
def test_graph_and_weight_layout_agree(precision: Precision) -> None:
    """Two accounts of the same weights: the modules' parameters and the packer's plan."""
    overrides = FP8_CONFIG if precision.quantized else {}
    config = ModelConfig.from_dict(small_config(num_shared_experts=1, **overrides))
    model = build_graph(config, precision, 64, 512)
    graph = {name: (int(v.dtype), tuple(v.shape)) for name, v in model.graph.initializers.items()}
    layout = {t.name: (t.dtype.onnx, t.shape) for t in bundle_tensors(config, precision, 512)}
    assert graph == layout


def test_stock_onnx_runtime_runs_the_file(exported: tuple[Path, Bundle]) -> None:
    checkpoint, bundle = exported
    session = onnxruntime.InferenceSession(bundle.folder / "model.onnx", providers=["CPUExecutionProvider"])
    ids = [5, 700, 31, 8]
    (logits,) = session.run(["logits"], inputs(bundle.manifest.model, ids))
    assert relative_error(logits, load_reference(checkpoint).logits(ids)) < 2e-5


def test_onnx_reference_evaluator_runs_the_file(exported: tuple[Path, Bundle]) -> None:
    checkpoint, bundle = exported
    model = onnx.load(bundle.folder / "model.onnx")
    ids = [5, 700, 31, 8]
    (logits,) = onnx.reference.ReferenceEvaluator(model).run(["logits"], inputs(bundle.manifest.model, ids))
    assert relative_error(logits, load_reference(checkpoint).logits(ids)) < 2e-5


def test_polygraphy_runs_the_file(exported: tuple[Path, Bundle]) -> None:
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    checkpoint, bundle = exported
    ids = [5, 700, 31, 8]
    with OnnxrtRunner(SessionFromOnnx(str(bundle.folder / "model.onnx"), providers=["cpu"])) as runner:
        logits = runner.infer(inputs(bundle.manifest.model, ids))["logits"]
    assert relative_error(np.asarray(logits), load_reference(checkpoint).logits(ids)) < 2e-5


def test_launches_of_a_layer_of_the_real_model() -> None:
    """One node is one kernel launch (AllReduce is removed for one rank): few enough for batch 1."""
    config = ModelConfig.from_dict({**FULL_CONFIG, **FP8_CONFIG, "num_hidden_layers": 3})
    model = build_graph(config, Precision.FP8, 64, 4096)
    of_layer_2 = Counter(node.op_type for node in model.graph if "layers.2." in (node.outputs[0].name or ""))
    assert of_layer_2.pop("AllReduce") == 2
    assert sum(of_layer_2.values()) == 12
