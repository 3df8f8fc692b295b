"""The one quantisation format of checkpoints: e4m3 weights with f32 scales of 128x128 blocks."""

from __future__ import annotations

from dataclasses import dataclass

from angelforge.config_json import Section, describe
from angelforge.errors import AngelForgeError

# Lists of modules left alone need no reading: the tensor types in the headers are checked one by one.
_LISTS = ("modules_to_not_convert", "ignored_layers", "ignore")


@dataclass(frozen=True)
class Quantization:
    """Block quantisation: weight = fp8 * scale, one f32 scale for `block` = (rows, columns) of a weight."""

    fmt: str = "e4m3"
    block: tuple[int, int] = (128, 128)


def read_quantization(config: Section) -> Quantization | None:
    """Reads `quantization_config`; any format but the block format of the published FP8 checkpoints is an error."""
    block = config.section("quantization_config")
    if block is None:
        return None
    # Transformers writes no fmt: the header check then sees by the tensors' types that it is e4m3.
    expected = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    for key, value in expected.items():
        found = block.get(key)
        if found != value and not (key == "fmt" and found is None):
            block.fail(key, f"{describe(value)} (the only quantised format that AngelForge reads)")
    for key in _LISTS:
        block.get(key)
    if unknown := list(block.unread()):
        raise AngelForgeError(f"{block.source} has keys that AngelForge does not know: {', '.join(unknown)}.")
    return Quantization()


def restore_quantization(block: Section | None) -> Quantization | None:
    """The inverse of `dataclasses.asdict` after JSON, None for None; raises AngelForgeError for anything else."""
    if block is None:
        return None
    size = block.get("block")
    if size != [128, 128] or block.get("fmt") != "e4m3":
        block.fail("block", "[128, 128] with fmt e4m3")
    return Quantization()
