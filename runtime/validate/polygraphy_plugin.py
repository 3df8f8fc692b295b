"""The runners on Polygraphy's own command line: `polygraphy run bundle/model.onnx --angelforge-judge …`.

Polygraphy finds `arg_groups` through the entry-point group `polygraphy.run.plugins`. Its runners take the KV pools as
inputs and give them as outputs, as the ONNX file says, so that they compare with any other runner of the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polygraphy.logger import G_LOGGER
from polygraphy.tools.args import ModelArgs
from polygraphy.tools.args.base import BaseArgs, BaseRunnerArgs
from polygraphy.tools.script import make_invocable

from angelforge.bundle import Bundle
from angelforge.errors import AngelForgeError
from angelforge.runtime.validate.references import FORMS, load_reference_for
from angelforge.runtime.validate.runners import (
    BundleRunner,
    EngineRunner,
    JudgeRunner,
    KernelRunner,
    ReferenceRunner,
)

AS_STORED = "as stored"


def arg_groups() -> list[BaseArgs]:
    """What Polygraphy adds to the options of `polygraphy run`."""
    return [JudgeArgs(), EngineArgs(), KernelArgs(), ReferenceArgs()]


def make_runner(kind: str, graph: str, choice: str | None = None) -> BundleRunner:
    """A runner of the bundle that the ONNX file `graph` stands in; `choice` is its target, reference or rounding.

    Raises:
        PolygraphyException: the file stands in no bundle, or the runner cannot be had; Polygraphy shows the message.
    """
    try:
        return _runner(kind, graph, choice)
    except AngelForgeError as error:
        G_LOGGER.critical(str(error))
        raise  # not reached: critical raises


def _runner(kind: str, graph: str, choice: str | None) -> BundleRunner:
    bundle = Bundle.open(Path(graph).absolute().parent)
    if kind == "engine":
        return EngineRunner(bundle, choice or "cpu", own_pool=False)
    if kind == "kernels":
        return KernelRunner(bundle, own_pool=False)
    if kind == "reference":
        return ReferenceRunner(bundle, load_reference_for(choice or "", bundle), f"reference: {choice}", own_pool=False)
    return JudgeRunner(bundle, own_pool=False, as_stored=choice == AS_STORED)


class _Args(BaseRunnerArgs):  # type: ignore[misc]
    """AngelForge: a runner of a bundle."""

    kind = ""
    title = ""

    def get_name_opt_impl(self) -> tuple[str, str]:
        """The runner's name, and its option without dashes."""
        return self.title, f"angelforge-{self.kind}"

    def choice(self) -> str | None:
        """What an option of the group says."""
        return None

    def add_to_script_impl(self, script: Any) -> None:
        """Polygraphy runs what it writes: one line that makes the runner."""
        script.add_import(imports=["make_runner"], frm=__name__)
        script.add_runner(make_invocable("make_runner", self.kind, self.arg_groups[ModelArgs].path, self.choice()))


class JudgeArgs(_Args):
    """AngelForge Judge: ONNX Runtime on the bundle's graph, widened to f32 where needed."""

    kind, title = "judge", "AngelForge judge"

    def add_parser_args_impl(self) -> None:
        """--angelforge-as-stored."""
        told = "Round the judge's values as the bundle stores them, as kernels and TensorRT engines do"
        self.group.add_argument("--angelforge-as-stored", help=told, action="store_true", default=None)

    def parse_impl(self, args: Any) -> None:
        """Keeps the flag."""
        self.as_stored = bool(args.angelforge_as_stored)

    def choice(self) -> str | None:
        """The rounding."""
        return AS_STORED if self.as_stored else None


class KernelArgs(_Args):
    """AngelForge Kernels: Triton kernels inside the bundle's graph, on a GPU or interpreted."""

    kind, title = "kernels", "AngelForge kernels"


class EngineArgs(_Args):
    """AngelForge Engine: the engine that was built for a target."""

    kind, title = "engine", "AngelForge engine"

    def add_parser_args_impl(self) -> None:
        """--angelforge-target."""
        self.group.add_argument(
            "--angelforge-target", help="The target whose engine is run. Default: cpu", default=None
        )

    def parse_impl(self, args: Any) -> None:
        """Keeps the target."""
        self.target = args.angelforge_target

    def choice(self) -> str | None:
        """The target."""
        return None if self.target is None else str(self.target)


class ReferenceArgs(_Args):
    """AngelForge Reference: a function from token ids to logits."""

    kind, title = "reference", "AngelForge reference"

    def add_parser_args_impl(self) -> None:
        """--angelforge-callable."""
        self.group.add_argument("--angelforge-callable", help=f"What the reference is: {FORMS}", default=None)

    def parse_impl(self, args: Any) -> None:
        """Keeps the name."""
        self.name = args.angelforge_callable

    def choice(self) -> str | None:
        """The name of the reference."""
        return None if self.name is None else str(self.name)
