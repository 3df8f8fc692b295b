"""The bundle's graph on ONNX Runtime's CUDA provider: another implementation of every operator's body, on a GPU.

Operators that the provider does not have (FP8, for one) fall back to the CPU, as ONNX Runtime decides. TF32 is off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from angelforge.bundle import Bundle
from angelforge.runtime.onnxruntime_device import Provider
from angelforge.runtime.validate.cutting import OrtPiece, cut
from angelforge.runtime.validate.engine_graph import Piece, Unit
from angelforge.runtime.validate.operations import JudgeGraph, Operation, Stage, judge_graph
from angelforge.runtime.validate.runners import StagedRunner


class ProviderGraph:
    """The bundle's graph under test on other providers, operator by operator."""

    as_stored = False

    def __init__(self, bundle: Bundle, judge: JudgeGraph, providers: Sequence[Provider]) -> None:
        """`providers` as ONNX Runtime takes them."""
        self._root, self._judge, self._providers = bundle.folder, judge, providers

    def units(self, operations: Sequence[Operation], whole: bool) -> Iterator[Unit]:
        """Pieces for `operations`, one for each or with `whole` one for all."""
        for group in [tuple(operations)] if whole else [(operation,) for operation in operations]:
            made = {name for operation in group for name in operation.outputs}
            inputs = dict.fromkeys(n for operation in group for n in operation.inputs if n not in made)
            outputs = tuple(name for operation in group for name in operation.outputs)
            piece = cut(self._judge.model, list(inputs), outputs)
            yield Unit(group, outputs, OrtPiece(piece, self._root, providers=self._providers))


class ProviderRunner(StagedRunner):
    """The same, whole."""

    def __init__(self, bundle: Bundle, name: str, providers: Sequence[Provider], num_pages: int = 2) -> None:
        """`providers` as ONNX Runtime takes them."""
        super().__init__(bundle, name, num_pages)
        self._providers = providers

    def open_stages(self) -> list[tuple[Stage, Piece]]:
        """A session for each stage."""
        judge, root = judge_graph(self.bundle), self.bundle.folder
        pieces = ((stage, cut(judge.model, stage.inputs, stage.outputs)) for stage in judge.stages)
        return [(stage, OrtPiece(piece, root, providers=self._providers)) for stage, piece in pieces]
