"""What may differ, by how an engine computes; docs/validation.md shows this table and a test compares the two.

Errors are relative: the largest difference of a tensor over its largest magnitude. An engine that computes in f32
differs from the judge by summation order. One that stores bf16 may round a value the other way: one step is 2^-8 of
the element. Where an e4m3 value lies near the middle of two, summation decides: a step of that element, rarely. One
such step changes everything behind it, so that whole FP8 models, and bf16 ones, are judged operator by operator; as
wholes only layer 0, which nothing has amplified yet, and whether they still say the same at all: of sound FP8 models
with random weights the worst that was measured, 24 layers deep beside NumPy, is a cosine of 0.77 and a mean KL of 0.9.
"""

from __future__ import annotations

from dataclasses import dataclass

from angelforge.precision import Precision


@dataclass(frozen=True)
class Thresholds:
    """Limits for one way to compute; None where that figure is shown and not judged."""

    operator: float  # relative error of an operator's output, given the judge's inputs
    router: float  # the same for the router's logits and weights: IEEE f32 whatever the precision
    quantized_share: float  # of the elements of an e4m3 tensor, which may be one step off
    quantized_step: float  # largest relative error of an e4m3 tensor times its scales
    layer: float | None  # relative error of a layer's output, given the judge's inputs
    logits: float | None  # relative error of the whole model's logits
    first_cache: float  # relative error of the keys and values of layer 0, the whole model running
    cosine: float  # least cosine of the whole model's logits, and of a layer's keys and values, over all calls
    kl: float  # largest mean KL of the whole model's logits, nats
    tie: float  # experts may differ where the router's decision was closer than this


BY_ROW = 2.0  # times an operator's limit: an error over the largest value of its own token, where rows are tokens

F32 = Thresholds(2e-5, 2e-5, 0.0, 0.0, 2e-5, 2e-5, 2e-5, 0.5, 2.0, 1e-5)
BF16 = Thresholds(8e-3, 2e-5, 0.0, 0.0, 3e-2, None, 3e-2, 0.5, 2.0, 1e-5)
FP8_IN_F32 = Thresholds(2e-5, 2e-5, 1e-2, 0.08, None, None, 0.08, 0.5, 2.0, 1e-5)
FP8 = Thresholds(8e-3, 2e-5, 2e-2, 0.08, None, None, 0.08, 0.5, 2.0, 1e-5)


def thresholds(precision: Precision, as_stored: bool) -> Thresholds:
    """The limits for a bundle's precision; `as_stored` where the engine stores bf16 and does not widen it."""
    if precision is Precision.FP32:
        return F32
    if precision is Precision.BF16:
        return BF16 if as_stored else F32
    return FP8 if as_stored else FP8_IN_F32
