"""Small tokenizers that are hard on streaming."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from angelforge.runtime.tokenizer import Tokenizer


def byte_level() -> Tokenizer:
    """One token a byte, one for a whole word and two special ones: most tokens are half characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(models.BPE({letter: token for token, letter in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_tokens(["word"])
    library.add_special_tokens(["<|end|>", "<|mark|>"])
    return Tokenizer(library)


def metaspace() -> Tokenizer:
    """Spaces as ▁ with the first one dropped, and bytes as <0x..> tokens, as in SentencePiece vocabularies."""
    words = ["▁", "▁the", "▁cat", "s", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    library = tokenizers.Tokenizer(models.BPE({word: token for token, word in enumerate(words)}, []))
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(library)
