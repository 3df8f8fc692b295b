"""`angelforge score`: the logits at every position of a list of token ids."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import perf_counter

import click

from angelforge.atomic import atomic_file
from angelforge.diskerrors import explained
from angelforge.errors import AngelForgeError, UsageError
from angelforge.runtime.batch import Float32
from angelforge.tools.engine_options import kv_memory_option, target_option, tensor_parallel_option, threads_option
from angelforge.tools.options import bundle_argument, json_option
from angelforge.tools.output import format_bytes, format_seconds, print_json, total_progress
from angelforge.tools.token_file import read_token_lists

_HEADER_BYTES = 4096  # more than the header of any .npy file


@click.command()
@bundle_argument
@target_option
@click.option("--tokens", type=click.Path(path_type=Path), required=True, help="A JSON file: a list of token ids.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The .npy file to write.")
@kv_memory_option
@threads_option
@tensor_parallel_option
@json_option
def score(
    bundle: Path,
    target: str,
    tokens: Path,
    output: Path,
    kv_memory: int | None,
    threads: int | None,
    tensor_parallel: int,
    as_json: bool,
) -> None:
    """Write the logits at every position of token ids, f32 [tokens, vocabulary], as a NumPy file.

    Row i holds the logits for the token after the first i + 1. The file appears when it is complete; memory does not
    grow with its size.

    \b
    Example:
      angelforge score bundle --tokens ids.json --output logits.npy
    """
    from angelforge.runtime.llm import LLM

    if output.is_dir() or output.absolute() == tokens.absolute():
        raise UsageError(f"--output is {str(output)!r}, but the name of a .npy file of its own is needed.")
    lists = read_token_lists(tokens)
    if len(lists) != 1:
        raise UsageError(f"{tokens} holds {len(lists)} lists of token ids, but one was expected.")
    begin = perf_counter()
    with total_progress("load weights") as progress:
        loaded = LLM(
            bundle,
            target,
            kv_memory=kv_memory,
            max_batch=1,
            threads=threads,
            tensor_parallel=tensor_parallel,
            progress=progress,
        )
    with loaded as llm:
        shape = (len(lists[0]), llm.config.vocab_size)
        pieces = llm.score_pieces(lists[0])
        with total_progress("score", "tokens") as report:
            _write(output, shape, _reported(pieces, shape[0], report))
    seconds = perf_counter() - begin
    if as_json:
        print_json({"output": str(output), "shape": list(shape), "seconds": round(seconds, 3)})
    else:
        click.echo(f"{output}: logits of {shape[0]} tokens, f32 {list(shape)}, in {format_seconds(seconds)}")


def _reported(pieces: Iterable[Float32], total: int, report: Callable[[int, int], None]) -> Iterator[Float32]:
    done = 0
    for piece in pieces:
        yield piece
        done += piece.shape[0]
        report(done, total)


def _write(path: Path, shape: tuple[int, int], pieces: Iterable[Float32]) -> None:
    """Writes rows as they come to a .npy file of `shape`; raises AngelForgeError if the disk is too small or fails."""
    needed = shape[0] * shape[1] * 4 + _HEADER_BYTES
    with explained("write", path):
        free = shutil.disk_usage(path.absolute().parent).free
    if needed > free:
        raise AngelForgeError(
            f"The logits take {format_bytes(needed)}, but the disk of {path} has {format_bytes(free)} free. Free some "
            "space or choose another disk."
        )
    with explained("write", path), atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(_header(shape))
        for piece in pieces:
            file.write(piece.astype("<f4", copy=False).tobytes())


def _header(shape: tuple[int, int]) -> bytes:
    """The begin of a .npy file, format version 1.0 of NumPy's `numpy.lib.format`."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    length = 10 + len(text) + 1
    text += " " * (-length % 64) + "\n"  # the data begins at a multiple of 64
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("ascii")
