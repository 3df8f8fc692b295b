"""The tokens of `angelforge validate`: a file, the demo's dialogues, or random ones; packed as a server packs them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from angelforge.bundle import Bundle
from angelforge.errors import UsageError
from angelforge.runtime.validate.data import Schedule, random_sequences, schedule
from angelforge.tools.token_file import read_token_lists

DEFAULT_LENGTH = 96  # of random sequences, where the bundle covers as much


@dataclass(frozen=True)
class DataOptions:
    """What the command line asked for."""

    tokens: Path | None
    dialogues: bool
    random: int | None
    length: int | None  # None where it was not asked for
    chunk: int
    padding: int
    seed: int


def make_schedule(bundle: Bundle, options: DataOptions) -> tuple[Schedule, str]:
    """The packed calls, and what they are in words; raises UsageError where they do not fit the bundle."""
    model = bundle.manifest.model
    if options.tokens is not None:
        sequences, told = read_token_lists(options.tokens), str(options.tokens)
    elif options.dialogues:
        sequences, told = _dialogues(bundle), "the demo's dialogues"
    else:
        count = options.random or 2
        length = _random_length(options.length, bundle.manifest.max_context)
        made = random_sequences(count, model.vocab_size, length, options.seed)
        sequences, told = [ids.tolist() for ids in made], f"{count} random sequences"
    planned = schedule(
        sequences,
        page_size=bundle.manifest.page_size,
        vocab_size=model.vocab_size,
        max_context=bundle.manifest.max_context,
        chunk=options.chunk,
        padding=options.padding,
        seed=options.seed,
    )
    longest = max(map(len, sequences))
    words = f"{told}: {planned.positions} tokens in {len(planned.steps)} packed calls, the longest sequence {longest}"
    return planned, words


def _random_length(asked: int | None, max_context: int) -> int:
    """Random sequences are up to a quarter longer than they are asked to be."""
    most = max(max_context * 4 // 5, 1)
    if asked is None:
        return min(DEFAULT_LENGTH, most)
    if asked > most:
        raise UsageError(
            f"--length is {asked}, but the bundle covers {max_context} positions, and random sequences are up to a "
            f"quarter longer than --length: at most {most}. Take less, or export with --rope-scaling or a larger "
            "--max-context."
        )
    return asked


def _dialogues(bundle: Bundle) -> list[list[int]]:
    from angelforge.runtime.chat import ChatTemplate
    from angelforge.runtime.tokenizer import Tokenizer
    from angelforge.tools.demo_answers import CALLS

    tokenizer, template = Tokenizer.load(bundle.folder), ChatTemplate.load(bundle.folder)
    if tokenizer is None or template is None:
        raise UsageError(f"The bundle {bundle.folder} has no tokenizer or no chat template; use --tokens or --random.")
    found = []
    for call in CALLS:
        roles = ("user", "assistant")
        messages = [{"role": roles[turn % 2], "content": text} for turn, text in enumerate(call)]
        found.append(tokenizer.encode(template.render(messages), add_special_tokens=False))
    return found
