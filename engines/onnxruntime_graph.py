"""Optimises a bundle's graph with ONNX Runtime, without reading a weight.

ONNX Runtime wants initializers to exist while it optimises, but with constant folding off it only looks at their types
and shapes. So it is given sparse files of the right size in place of the weight files; the optimised graph then points
to the real ones. A bundle whose weights are still being packed can be built all the same.
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnx_ir as ir
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state
from packaging.version import Version

from angelforge.errors import AngelForgeError

# ONNX Runtime's exceptions share no base class of their own; what fails in a run with bound inputs is a RuntimeError.
ONNXRUNTIME_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    *(
        kind
        for kind in vars(onnxruntime_pybind11_state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
)


# What a graph uses is the same in opset 23 and 24, and ONNX Runtime 1.23, the last one for Python 3.10, stops at 23.
OLDER_OPSET = 23
FIRST_WITH_OPSET_24 = Version("1.24")


# Optimisers that look at the values of initializers, which are zeros here: ConstantSharing would merge all biases of up
# to 8 experts into one.
_READ_VALUES = ("ConstantFolding", "ConstantSharing")


def session_options(weights_root: Path, threads: int = 0) -> onnxruntime.SessionOptions:
    """Options under which initializers are mapped from files below `weights_root` and not copied."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # With memory patterns ONNX Runtime reserves one block for all initializers, though it maps them from files.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights_root))
    options.add_session_config_entry("session.disable_prepacking", "1")
    # Waiting actively within a call saves a quarter of its time; between calls it would take the cores from the other
    # session of a target and its draft, and from others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # FP8 is quantised and widened by exact rules; fusing the two, as ONNX Runtime does for int8, is another operation.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def optimize(model: ir.Model, fuse: bool = True) -> bytes:
    """The graph of `model` with functions inlined, as a serialised ONNX model.

    With `fuse` some nodes become fused ones of ONNX Runtime's own, which the CPU has; without all are ONNX's.

    Raises:
        AngelForgeError: ONNX Runtime refuses the graph.
    """
    fit_opset(model)
    with TemporaryDirectory(prefix="angelforge-build-") as scratch:
        root = Path(scratch)
        _place_sparse_files(model, root)
        optimized = root / "optimized.onnx"
        options = session_options(root)
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED if fuse else levels.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(optimized)
        try:
            onnxruntime.InferenceSession(
                ir.to_proto(model).SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=list(_READ_VALUES),
            )
        except ONNXRUNTIME_ERRORS as error:
            raise AngelForgeError(f"ONNX Runtime {onnxruntime.__version__} refuses the graph: {error}") from error
        result = onnx.load(optimized, load_external_data=False)
    _check_weights(result, model.graph.initializers)
    return result.SerializeToString()


def fit_opset(model: ir.Model) -> None:
    """Writes `model` for the newest opset that the installed ONNX Runtime knows."""
    if Version(onnxruntime.__version__) >= FIRST_WITH_OPSET_24:
        return
    for opsets in (model.opset_imports, *(function.opset_imports for function in model.functions.values())):
        opsets[""] = OLDER_OPSET


def _place_sparse_files(model: ir.Model, root: Path) -> None:
    sizes: dict[str, int] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            name = str(tensor.location)
            sizes[name] = max(sizes.get(name, 0), (tensor.offset or 0) + (tensor.length or 0))
    for name, size in sizes.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size)


def _check_weights(optimized: onnx.ModelProto, weights: Mapping[str, ir.Value]) -> None:
    """The optimiser must have left every weight where it was: what it inlined would be the sparse file's zeros."""
    found = {tensor.name: tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in optimized.graph.initializer}
    wrong = [name for name, external in found.items() if external != (name in weights)]
    wrong += [name for name in weights if name not in found]
    if wrong:
        raise AngelForgeError(
            f"ONNX Runtime {onnxruntime.__version__} rewrote the weight {wrong[0]} while optimising; "
            "please report this with the version."
        )
