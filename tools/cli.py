"""The command `angelforge`: a group that imports a command's module only when that command is called."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click

import angelforge
from angelforge.tools.failures import ErrorStyle, failures_as_messages
from angelforge.tools.streams import prepare_streams

# Command: its line in `angelforge --help`. Kept here so that the list needs no import of what the commands import.
SUMMARIES = {
    "doctor": "Say what this machine can do, and how to close the gaps.",
    "plan": "Say from a checkpoint's headers what fits on a target.",
    "export": "Turn a Hugging Face checkpoint into a bundle.",
    "build": "Build a bundle's engine for a target.",
    "run": "Generate text with a built bundle.",
    "score": "Write the logits at every position of token ids.",
    "validate": "Compare a bundle with ONNX Runtime, tensor by tensor.",
    "inspect": "Show what a bundle, checkpoint or safetensors file holds.",
    "bench": "Measure packing, header checks, steps, kernels, decoding, servers.",
    "serve": "Serve a built bundle over HTTP.",
    "demo": "Make, compile and run a small model; everything at once.",
}


class LazyGroup(click.Group):
    """A group whose command NAME is the attribute NAME of the module `angelforge.tools.NAME`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands that this installation has, in the order of work."""
        return [name for name in SUMMARIES if find_spec(f"angelforge.tools.{name}")]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command; None when there is none of that name."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = getattr(import_module(f"angelforge.tools.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from SUMMARIES, importing none of them."""
        rows = [(name, SUMMARIES[name]) for name in self.list_commands(ctx)]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def main(self, *args: Any, **extra: Any) -> Any:
        """Answer one command line."""
        prepare_streams()
        return super().main(*args, **extra)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse the options before the command, and note how errors are to be shown, whatever goes wrong where."""
        options = args[: args.index("--")] if "--" in args else args
        style = ErrorStyle(debug="--debug" in options, as_json="--json" in options)
        with failures_as_messages(style):
            ctx = super().make_context(info_name, args, parent, **extra)
        ctx.obj = style
        return ctx

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; failures end as one or two sentences and an exit code."""
        with failures_as_messages(ctx.obj):
            return super().invoke(ctx)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error, for developers.")
@click.version_option(angelforge.__version__, prog_name="angelforge")
def main(debug: bool) -> None:
    """Compile AntAngelMed and other BailingMoeV2 checkpoints to engines, and run them.

    \b
    Example:
      angelforge export CHECKPOINT bundle
      angelforge build bundle --target cpu
      angelforge run bundle --prompt "What does aspirin do?"

    Exit codes: 0 ok, 1 failed, 2 used wrongly, 130 interrupted. A command given --json prints its errors as
    {"error": "..."} on standard output too.
    """
