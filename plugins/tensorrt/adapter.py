"""One adapter that turns any operator into a TensorRT plugin (IPluginV3) and registers its creator.

Shapes come from the operator's shape rule over TensorRT's dimension expressions, types from its type rule. A plugin
launches the operator's kernel on TensorRT's stream; no data is copied.
"""

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from angelforge.errors import AngelForgeError
from angelforge.plugins.operator import DOMAIN, Operator
from angelforge.plugins.tensorrt.dims import from_expressions, to_expressions
from angelforge.plugins.tensorrt.driver import current_gpu, has_context, launch, load
from angelforge.plugins.tensorrt.fields import empty_arrays, from_fields, to_arrays, to_fields
from angelforge.plugins.tensorrt.launches import Launch, plan_launch
from angelforge.plugins.tensorrt.library import Library
from angelforge.plugins.tensorrt.types import from_tensorrt, to_tensorrt

Attributes = Mapping[str, int | float]


class _Plugin:
    """Build and runtime capabilities of one node. TensorRT's base classes are mixed in by `_creator_class`.

    An exception in a callback can end the process (seen with TensorRT-RTX 1.7: corrupted memory), so graphs are
    compared with the operators' rules before they are parsed (`engines/network.py`).
    """

    api: Any  # TensorRT's module

    def __init__(self, operator: Operator, attributes: Attributes) -> None:
        for base in _bases(self.api):
            base.__init__(self)
        self.operator, self.attributes = operator, attributes
        self.arrays = to_arrays(operator, attributes)
        self.planned: tuple[Any, Launch] | None = None  # of the last shapes: a decode repeats them
        self.plugin_name, self.plugin_namespace = operator.name, DOMAIN
        self.plugin_version = str(operator.version)
        self.num_outputs = len(operator.outputs)
        # TensorRT deletes the plugins of a failed build and then drops its reference, at which the bindings delete them
        # again and corrupt the heap (seen in TensorRT-RTX 1.7.1). A reference that nobody drops prevents it.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))

    def get_capability_interface(self, kind: Any) -> "_Plugin":
        """One object has all capabilities."""
        return self

    def clone(self) -> "_Plugin":
        """A copy."""
        return type(self)(self.operator, self.attributes)

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        """The operator's type rule."""
        types = self.operator.output_types([from_tensorrt(self.api, dtype) for dtype in input_types], self.attributes)
        return [to_tensorrt(self.api, dtype) for dtype in types]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        """The operator's shape rule."""
        bound = self.operator.bind([from_expressions(self.api, builder, dims) for dims in inputs])
        shapes = self.operator.output_shapes({**bound, **self.attributes})
        return [to_expressions(self.api, builder, shape) for shape in shapes]

    def get_aliased_input(self, output: int) -> int:
        """The input whose memory an output shares, -1 for none."""
        source = self.operator.aliases.get(self.operator.outputs[output].name)
        return -1 if source is None else [port.name for port in self.operator.inputs].index(source)

    def supports_format_combination(self, position: int, tensors: Sequence[Any], num_inputs: int) -> bool:
        """Row-major memory, and the types of the operator's rule."""
        own = tensors[position].desc
        if own.format != self.api.TensorFormat.LINEAR:
            return False
        try:
            if position < num_inputs:
                port = self.operator.inputs[position]
                return from_tensorrt(self.api, own.type).name in self.operator.types.get(port.type, (port.type,))
            types = self.get_output_data_types([tensor.desc.type for tensor in tensors[:num_inputs]])
        except ValueError:
            return False
        return bool(own.type == types[position - num_inputs])

    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Nothing depends on the profile: a kernel's tile follows from the shapes of each call."""

    def get_valid_tactics(self) -> list[int]:
        """No tactics of its own."""
        return []

    def set_tactic(self, tactic: int) -> None:
        """There is only the default one."""

    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Compiles and loads the kernel for these shapes: CUDA refuses that while the stream of `enqueue` is captured,
        which TensorRT may do in order to time it. It comes before every first `enqueue`.
        """
        if has_context():
            load(self._plan(inputs))

    def attach_to_context(self, context: Any) -> "_Plugin":
        """Execution contexts share nothing."""
        return self.clone()

    def get_fields_to_serialize(self) -> Any:
        """The attributes."""
        return to_fields(self.api, self.operator, self.arrays)

    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launches the operator's kernel on TensorRT's stream, on TensorRT's own memory."""
        launch(self._plan(input_desc), inputs, outputs, stream)

    def _plan(self, inputs: Sequence[Any]) -> Launch:
        """For inputs of these descriptions."""
        shapes = tuple(tuple(desc.dims) for desc in inputs)
        if self.planned is None or self.planned[0] != shapes:
            types = [from_tensorrt(self.api, desc.type) for desc in inputs]
            self.planned = shapes, plan_launch(self.operator, shapes, types, self.attributes, None, current_gpu())
        return self.planned[1]


def _bases(api: Any) -> tuple[Any, ...]:
    return api.IPluginV3, api.IPluginV3OneCore, api.IPluginV3OneBuildV2, api.IPluginV3OneRuntime


class _Creator:
    """Makes the plugins of one operator from fields. TensorRT's base class is mixed in by `_creator_class`."""

    api: Any
    plugin_class: type[_Plugin]

    def __init__(self, operator: Operator) -> None:
        self.api.IPluginCreatorV3One.__init__(self)
        self.operator = operator
        self.name, self.plugin_namespace = operator.name, DOMAIN
        self.plugin_version = str(operator.version)
        self.arrays = empty_arrays(operator)
        self.field_names = to_fields(self.api, operator, self.arrays)

    def create_plugin(self, name: str, fields: Any, phase: Any) -> _Plugin:
        """A plugin for the node `name`."""
        return self.plugin_class(self.operator, from_fields(self.operator, fields))


@cache
def _creator_class(api: Any) -> type[_Creator]:
    plugin = type("AngelForgePlugin", (_Plugin, *_bases(api)), {"api": api})
    return type("AngelForgePluginCreator", (_Creator, api.IPluginCreatorV3One), {"api": api, "plugin_class": plugin})


def register(library: Library, operators: Iterable[Operator]) -> None:
    """Registers the operators' creators in the namespace "angelforge"; those that are registered already stay.

    Raises:
        AngelForgeError: TensorRT refuses a creator.
    """
    registry = library.api.get_plugin_registry()
    for operator in operators:
        if registry.get_creator(operator.name, str(operator.version), DOMAIN) is not None:
            continue
        if not registry.register_creator(_creator_class(library.api)(operator), DOMAIN):
            raise AngelForgeError(f"{library.title} refuses the plugin {operator.name}; please report this.")
