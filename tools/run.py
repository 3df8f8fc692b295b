"""`angelforge run`: generate text with a built bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from angelforge.errors import UsageError
from angelforge.runtime.depth import Depth
from angelforge.runtime.sampling import SamplingParams
from angelforge.tools.engine_options import (
    cuda_graphs_option,
    kv_memory_option,
    target_option,
    tensor_parallel_option,
    threads_option,
)
from angelforge.tools.options import NUMBER, bundle_argument, json_option
from angelforge.tools.output import print_json, total_progress
from angelforge.tools.run_chat import chat
from angelforge.tools.run_text import print_outputs
from angelforge.tools.speculation_text import describe, speculate_option
from angelforge.tools.token_file import read_token_lists

if TYPE_CHECKING:
    from angelforge.runtime.llm import LLM
    from angelforge.runtime.prompts import Prompt

DEFAULT = SamplingParams()


@click.command()
@bundle_argument
@target_option
@click.option("--prompt", "prompts", multiple=True, help="A prompt; give the option again for more, run together.")
@click.option("--tokens", type=click.Path(path_type=Path), help="A JSON file: token ids, or a list of lists of them.")
@click.option("--chat", "chatting", is_flag=True, help="Talk to the model in its own chat format.")
@click.option("--system", help="The system message of a chat.")
@click.option("--max-tokens", default=DEFAULT.max_tokens, show_default=True, help="Tokens an output has at most.")
@click.option(
    "--temperature", type=NUMBER, default=DEFAULT.temperature, show_default=True, help="0: always the likeliest token."
)
@click.option("--top-k", default=DEFAULT.top_k, show_default=True, help="Keep the K likeliest tokens; 0: all.")
@click.option(
    "--top-p",
    type=NUMBER,
    default=DEFAULT.top_p,
    show_default=True,
    help="Keep the likeliest tokens that hold P; 1: all.",
)
@click.option(
    "--min-p", type=NUMBER, default=DEFAULT.min_p, show_default=True, help="Keep tokens P times as likely as the best."
)
@click.option(
    "--repetition-penalty", type=NUMBER, default=DEFAULT.repetition_penalty, show_default=True, help="1: none."
)
@click.option(
    "--presence-penalty",
    type=NUMBER,
    default=DEFAULT.presence_penalty,
    show_default=True,
    help="Of what was said; 0: none.",
)
@click.option(
    "--frequency-penalty", type=NUMBER, default=DEFAULT.frequency_penalty, show_default=True, help="Of each time."
)
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--stop", multiple=True, help="End the output before this text; may be given again.")
@click.option("--ignore-eos", is_flag=True, help="Do not end at the model's end tokens.")
@click.option("--logprobs", type=int, metavar="K", help="With --json: logprobs of the output, and of the K likeliest.")
@click.option("--max-batch", default=32, show_default=True, help="Prompts that run at once.")
@speculate_option
@kv_memory_option
@threads_option
@tensor_parallel_option
@cuda_graphs_option
@json_option
@click.pass_context
def run(
    ctx: click.Context,
    /,
    bundle: Path,
    target: str,
    prompts: tuple[str, ...],
    tokens: Path | None,
    chatting: bool,
    system: str | None,
    max_batch: int,
    speculate: Depth,
    kv_memory: int | None,
    threads: int | None,
    tensor_parallel: int,
    cuda_graphs: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Generate text, or token ids where a bundle has no tokenizer.

    Text is printed as it comes; several prompts run together and are printed in their order. With --json the outputs
    are printed as one list: text, token_ids, prompt_token_ids, finish_reason (stop, length or error), error, timings,
    speculation, logprobs, cached_tokens. What a bundle's draft did in all goes to standard error.

    \b
    Example:
      angelforge run bundle --prompt "What does aspirin do?" --temperature 0.6 --top-p 0.95
    """
    from angelforge.runtime.llm import LLM

    if (len(prompts) > 0) + (tokens is not None) + chatting != 1:
        raise UsageError("Say what to run: --prompt TEXT, --tokens FILE or --chat, and only one of them.")
    if system is not None and not chatting:
        raise UsageError("--system is for --chat.")
    if chatting and as_json:
        raise UsageError("--chat is for people and has no --json. Use --prompt or --tokens.")
    if sampling["logprobs"] is not None and not as_json:
        raise UsageError("--logprobs are printed with --json only.")
    params = SamplingParams(**sampling)
    _tell_idle_options(params)
    inputs: Sequence[Prompt] = list(prompts) if tokens is None else read_token_lists(tokens)
    with total_progress("load weights") as progress:
        loaded = LLM(
            bundle,
            target,
            kv_memory=kv_memory,
            max_batch=max_batch,
            threads=threads,
            speculate=speculate,
            tensor_parallel=tensor_parallel,
            cuda_graphs=cuda_graphs,
            progress=progress,
        )
    with loaded as llm:
        ok = _run(llm, inputs, params, chatting, system, as_json)
        if llm.speculation is not None:
            click.echo(describe(llm.speculation), err=True)
    ctx.exit(int(not ok))


def _tell_idle_options(params: SamplingParams) -> None:
    """A note on options that were given and choose nothing, since the default temperature draws no token."""
    idle = [name for name in ("top_k", "top_p", "min_p", "seed") if getattr(params, name) != getattr(DEFAULT, name)]
    if idle and params.temperature == 0:
        names = ", ".join("--" + name.replace("_", "-") for name in idle)
        click.echo(f"note: {names}: of no use at temperature 0 (the likeliest token); see --temperature.", err=True)


def _run(
    llm: LLM, inputs: Sequence[Prompt], params: SamplingParams, chatting: bool, system: str | None, as_json: bool
) -> bool:
    """Runs what was asked for and prints it; whether all went well."""
    if chatting:
        chat(llm, params, system)
        return True
    if as_json:
        outputs = llm.generate(inputs, params)
        print_json([output.to_dict() for output in outputs])
        return all(output.error is None for output in outputs)
    return print_outputs(llm, llm.stream(inputs, params), len(inputs))
