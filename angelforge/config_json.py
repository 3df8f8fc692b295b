"""Typed, checked access to a JSON object: every error names the file, the key, what was found and what was expected."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from angelforge.diskerrors import explained
from angelforge.errors import AngelForgeError

# Larger sizes are damage or an attack: a tensor axis must fit an ONNX Runtime and TensorRT int32 extent.
LARGEST_SIZE = 2**31 - 1
_LARGEST_FILE = 100_000_000  # bytes; the index of the 103B model in FP8 has 5 million
_REQUIRED: Any = object()


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object, refusing NaN, infinities and repeated keys, which Python's reader would let through."""
    with explained("read", path):
        size = path.stat().st_size
        if size > _LARGEST_FILE:
            raise AngelForgeError(f"{path} has {size} bytes, but a JSON file of at most {_LARGEST_FILE} was expected.")
        data = path.read_bytes()

    def refuse_constant(name: str) -> NoReturn:
        raise AngelForgeError(f"{path} contains {name}, which is not a JSON value: write a finite number.")

    def refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            repeated = [name for name, count in counts.most_common(3) if count > 1]
            raise AngelForgeError(f"{path} gives a key of one object more than once: {', '.join(repeated)}.")
        return found

    try:
        value = json.loads(data, parse_constant=refuse_constant, object_pairs_hook=refuse_repeated)
    except json.JSONDecodeError as error:
        raise AngelForgeError(f"{path} is not valid JSON: {error}.") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; not UTF-8; an integer of 4300 digits
        raise AngelForgeError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise AngelForgeError(f"{path} holds {describe(value)}, but a JSON object was expected.")
    return value


def describe(value: object) -> str:
    """A value as it stands in an error message: JSON, shortened."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:56]} ..."


class Section:
    """A JSON object whose keys are read with a type and a range; remembers which keys were read.

    `source` names the object in messages, for example ``config.json`` or ``config.json: rope_scaling``.
    A null value counts as absent, as in Hugging Face configurations.
    """

    def __init__(self, raw: object, source: str) -> None:
        if not isinstance(raw, Mapping):
            raise AngelForgeError(f"{source} is {describe(raw)}, but a JSON object was expected.")
        self.raw: Mapping[str, Any] = raw
        self.source = source
        self.read: set[str] = set()

    def fail(self, key: str, expected: str) -> NoReturn:
        """Raises the error for `key`: what was found, what was expected."""
        found = f"is {describe(self.raw[key])}" if self.raw.get(key) is not None else "is missing"
        raise AngelForgeError(f"{self.source}: {key} {found}, but {expected} is needed.")

    def get(self, key: str) -> Any:
        """The raw value, None if absent or null."""
        self.read.add(key)
        return self.raw.get(key)

    def integer(self, key: str, default: Any = _REQUIRED, least: int = 1, most: int = LARGEST_SIZE) -> Any:
        """An integer from `least` to `most`; `default` if absent, an error if there is no default."""
        value = self.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if type(value) is not int or not least <= value <= most:  # type(): True is an int for isinstance
            self.fail(key, f"an integer from {least} to {most}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, above: float = 0.0) -> Any:
        """A finite number > `above` as float; `default` if absent, an error if there is no default."""
        value = self.get(key)
        if value is None and default is not _REQUIRED:
            return default
        try:
            found = float(value) if type(value) in (int, float) else math.nan
        except OverflowError:
            found = math.nan
        if not (math.isfinite(found) and found > above):
            self.fail(key, f"a number greater than {above:g}")
        return found

    def boolean(self, key: str, default: bool) -> bool:
        """true or false; `default` if absent."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string; `default` if absent, an error if that is None."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            self.fail(key, "a string")
        return value

    def section(self, key: str) -> Section | None:
        """A nested object, None if absent."""
        value = self.get(key)
        return None if value is None else Section(value, f"{self.source}: {key}")

    def unread(self) -> Iterable[str]:
        """The keys with a value that nothing has read, in file order."""
        return (key for key, value in self.raw.items() if value is not None and key not in self.read)
