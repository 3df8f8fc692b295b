"""What the target hands to an EAGLE3 draft: its states after some layers, projected to one (MODEL.md, EAGLE3 draft)."""

from collections.abc import Callable

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from angelforge.draft_config import DraftConfig
from angelforge.exporter.parts import Projection, ResidualNorm
from angelforge.precision import Precision


class CapturedStates(nn.Module):  # type: ignore[misc]
    """`fc` and `fc_norm` of the draft's checkpoint; they run in the target's graph, where the states are.

    Never in FP8: what `fc` reads is the residual stream itself, which nothing in a model quantises.
    """

    def __init__(self, config: DraftConfig, precision: Precision) -> None:
        super().__init__("draft")
        self.layers = config.capture_layers
        self.fc = Projection(config.captured_size, config.hidden_size, precision.activation, precision.activation)
        norms = [ResidualNorm(config, precision, quantize=False) for _ in self.layers]
        self.fc_norm = nn.ModuleList(norms) if config.fc_norm else None

    def forward(self, op: OpBuilder, stream_after: Callable[[OpBuilder, int], ir.Value]) -> ir.Value:
        """[T, H] = fc(the states side by side); `stream_after` gives the residual stream [T, H] after a layer."""
        states = [stream_after(op, layer) for layer in self.layers]
        if self.fc_norm is not None:
            states = [norm(op, state, None)[1].plain for norm, state in zip(self.fc_norm, states, strict=True)]
        joined = op.Concat(*states, axis=1) if len(states) > 1 else states[0]
        return self.fc(op, joined)
