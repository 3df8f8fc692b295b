"""The checkpoint's files about text: checked before the first weight is packed, and taken over as they are."""

from pathlib import Path
from shutil import copyfile

import tokenizers

from angelforge.atomic import atomic_file
from angelforge.config_json import read_json_object
from angelforge.diskerrors import explained
from angelforge.errors import AngelForgeError

TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
SETTINGS = ("tokenizer_config.json", "chat_template.json")  # what the runtime reads beside it


def check_tokenizer(folder: Path) -> None:
    """Reads what there is of tokenizer and its settings: a bundle that cannot read text would show it hours later.

    Raises:
        AngelForgeError: `tokenizer.json` cannot be read as a tokenizer, or another file is no JSON object.
    """
    for name in SETTINGS:
        if (folder / name).is_file():
            read_json_object(folder / name)
    file = folder / TOKENIZER
    if not file.is_file():
        return
    with explained("read", file):
        text = file.read_bytes()
    try:
        tokenizers.Tokenizer.from_buffer(text)
    except ValueError as error:
        raise AngelForgeError(
            f"{file} cannot be read as a tokenizer: {error}. Fetch the file again, or remove it to work with token ids."
        ) from error


def copy_tokenizer(origin: Path, folder: Path) -> list[str]:
    """Copies what there is of `TOKENIZER_FILES` and returns the names."""
    names = [name for name in TOKENIZER_FILES if (origin / name).is_file()]
    for name in names:
        with explained("copy", origin / name), atomic_file(folder / name) as temporary:
            copyfile(origin / name, temporary)
    return names
