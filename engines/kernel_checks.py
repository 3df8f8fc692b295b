"""Asks every kernel of a graph whether it serves the sizes and types it is to be launched with.

TensorRT would ask only while it builds, inside a callback whose exceptions it does not understand.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import onnx_ir as ir

from angelforge.engines.profiles import Profile
from angelforge.engines.shapes import concrete_shapes
from angelforge.errors import AngelForgeError
from angelforge.plugins.binding import bind
from angelforge.plugins.kernel import Gpu
from angelforge.plugins.operator import DOMAIN
from angelforge.plugins.registry import OPERATORS
from angelforge.plugins.tensorrt.kernels import find_kernel, kernel_digest


def check_kernels(model: ir.Model, profiles: Sequence[Profile], gpu: Gpu) -> None:
    """Evaluates the launch rules of a prepared graph's kernels, without compiling, at the ends of every profile.

    Without triton nothing can be asked, and nothing is.

    Raises:
        AngelForgeError: naming the layer, its operator, and what its kernel cannot serve.
    """
    if find_spec("triton") is None:
        return
    asked = set()
    for profile in profiles:
        shapes = concrete_shapes(model, {symbol: sizes.most for symbol, sizes in profile.symbols().items()})
        for node in model.graph:
            if node.domain != DOMAIN or kernel_digest(OPERATORS[node.op_type]) == "none":
                continue
            operator, inputs = OPERATORS[node.op_type], [value for value in node.inputs if value is not None]
            attributes = {a.name: a.kind(node.attributes[a.name].value) for a in operator.attributes}
            types = [value.dtype for value in inputs if value.dtype is not None]
            key = (operator.name, tuple(shapes[v] for v in inputs), tuple(types), tuple(attributes.items()))
            if key in asked:
                continue
            asked.add(key)
            kernel = find_kernel(operator)
            try:
                binding = bind(operator, [shapes[value] for value in inputs], types, attributes)
                tile = kernel.tile(binding.dims, binding.dims["T"])
                kernel.constants(binding.dims, binding.types, tile)
                kernel.grid(binding.dims, gpu, tile)
            except ValueError as error:
                raise AngelForgeError(
                    f"No kernel serves the layer {node.name} ({operator.name}) in profile {profile.name}: {error}."
                ) from error
