"""How many positions a bundle covers: never silently more than the model can."""

from angelforge.config import ModelConfig
from angelforge.errors import UsageError
from angelforge.rope import too_long_remedy


def context_limit(config: ModelConfig, asked: int | None) -> int:
    """Positions of a bundle: as asked, by default all that the model covers.

    Raises:
        UsageError: more than the model covers; the message says what to do.
    """
    if asked is None:
        return config.max_context
    if 1 <= asked <= config.max_context:
        return asked
    raise UsageError(
        f"--max-context is {asked}, but the model covers {config.max_context} positions; beyond them its answers are "
        f"garbage. {too_long_remedy(config, asked)}"
    )
