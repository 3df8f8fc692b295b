"""Everything that can compute what a device's sampler asks for: its tests hold for each."""

import pytest

from angelforge.runtime.device_torch import TorchWork

EVERY_WORK = pytest.mark.parametrize("work", [pytest.param(TorchWork(), id="torch")])
