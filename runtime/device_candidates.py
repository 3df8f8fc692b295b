"""What can come next at many places at once, from logits on a device: what a draft may propose."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from angelforge.runtime.device_adjusting import Place
from angelforge.runtime.device_round import Options
from angelforge.runtime.device_sampling import DeviceSampler


def candidates_on_device(logits: torch.Tensor, places: Sequence[Place]) -> list[Options]:
    """What `distribution.candidates` gives for each place, from `logits` f32 [R, vocab] on a device.

    Where the largest logits do not tell, the whole row comes to the host. Raises AngelForgeError where the device fails
    in this or earlier work.
    """
    return DeviceSampler(logits.device).answer(logits, [], places).options
