"""Text to token ids and back, with the checkpoint's own `tokenizer.json`."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import tokenizers

from angelforge.errors import AngelForgeError


class Tokenizer:
    """A loaded `tokenizer.json`. Ids that it does not know decode to nothing."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        # What a training script left in the file must not cut or fill prompts.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer of a bundle or checkpoint; None if it has no `tokenizer.json`.

        Raises AngelForgeError if the file cannot be read as one.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            return None
        with _LibraryErrors(f"{file} cannot be read as a tokenizer"):
            return cls(tokenizers.Tokenizer.from_file(str(file)))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with what the tokenizer puts around a text (a begin token) unless told otherwise."""
        try:
            text.encode()  # a lone surrogate: half a character from a damaged argument or JSON escape
        except UnicodeEncodeError as error:
            raise AngelForgeError(
                f"The text is not valid Unicode: {error.reason} at character {error.start}."
            ) from None
        with _LibraryErrors("The text cannot be tokenized"):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids without special tokens; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def to_json(self) -> str:
        """The whole tokenizer as the text of a `tokenizer.json`, for libraries that read it themselves."""
        text: str = self._tokenizer.to_str()
        return text

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is written like `text`, None if there is none."""
        found = self._tokenizer.token_to_id(text)
        return found if found in self.special_ids else None


class _LibraryErrors:
    """Turns what the tokenizers library raises, plain `Exception`s, into AngelForgeErrors; anything else passes."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is Exception:
            raise AngelForgeError(f"{self.what}: {error}.") from error
