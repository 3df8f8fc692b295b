"""TensorRT's runtime object, which loads engines; or why there is none."""

from typing import Any

from angelforge.engines.tensorrt_errors import explain_run_errors
from angelforge.engines.tensorrt_log import logger_of
from angelforge.errors import AngelForgeError
from angelforge.plugins.tensorrt.library import Library


def make_runtime(library: Library) -> Any:
    """An IRuntime.

    Raises:
        AngelForgeError: TensorRT cannot start on this machine (an old driver, no GPU), with what it said.
    """
    logger = logger_of(library)
    logger.run_errors.clear()
    try:
        return library.api.Runtime(logger)
    except TypeError as error:  # how the bindings say that the library returned nothing
        raise AngelForgeError(explain_run_errors(library.title, "start here", list(logger.run_errors))) from error
