"""From a prepared graph to a TensorRT network."""

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from angelforge.engines.tensorrt_errors import describe_nodes, explain_parser_errors
from angelforge.engines.tensorrt_log import logger_of
from angelforge.errors import AngelForgeError
from angelforge.plugins.tensorrt.library import Library


@dataclass(frozen=True)
class ParsedNetwork:
    """TensorRT's objects for one build. They refer to each other and are kept together."""

    builder: Any
    network: Any
    parser: Any


def parse_network(library: Library, model: ir.Model, flags: int = 0) -> ParsedNetwork:
    """Gives `model`, prepared by `prepare_network`, to the ONNX parser. Plugins must be registered before.

    Raises:
        AngelForgeError: TensorRT cannot start here, or refuses a node; the message names it.
    """
    logger = logger_of(library)
    try:
        builder = library.api.Builder(logger)
    except TypeError as error:  # how the bindings say that the library returned nothing
        raise AngelForgeError(
            f"{library.title} cannot start on this machine: it needs an NVIDIA GPU with driver 580 or newer."
        ) from error
    network = builder.create_network(flags)
    parser = library.api.OnnxParser(network, logger)
    if not parser.parse(ir.to_proto(model).SerializeToString()):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise AngelForgeError(explain_parser_errors(library.title, errors, describe_nodes(model)))
    return ParsedNetwork(builder, network, parser)
