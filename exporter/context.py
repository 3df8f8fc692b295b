"""How many positions a bundle covers: never silently more than the model can."""

from angelforge.config import ModelConfig
from angelforge.errors import UsageError


def context_limit(config: ModelConfig, asked: int | None) -> int:
    """Positions of a bundle: as asked, by default all that the model covers.

    Raises:
        UsageError: more than the model covers; the message names the option that stretches it.
    """
    covered = config.max_context
    if asked is None:
        return covered
    if asked < 1:
        raise UsageError(f"--max-context is {asked}, but at least 1 position is needed.")
    if asked <= covered:
        return asked
    if config.rope_scaling is not None:
        raise UsageError(
            f"--max-context {asked} is more than the {covered} positions that YaRN factor "
            f"{config.rope_scaling.factor:g} covers. Ask for at most {covered}."
        )
    factor = 2
    while factor * covered < asked:
        factor *= 2
    raise UsageError(
        f"--max-context {asked} is more than the {covered} positions the model was trained on; without rope scaling "
        f"its answers beyond them are garbage. Add --rope-scaling yarn:{factor}."
    )
