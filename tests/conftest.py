"""What all tests share: hypothesis profiles and small models. Helpers in `tests/support`: `from support.x import y`."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Triton decides when a kernel is imported whether it is interpreted: all of this process's are, and what needs compiled
# kernels runs in a process of its own (support/compiled.py).
os.environ["TRITON_INTERPRET"] = "1"

# A shell's background job is started with Ctrl-C ignored, and every process below it inherits that: tests press Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run of `make test`, so that it never fails by chance; `make test-full` looks for new ones.
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("full", deadline=None, max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint in BF16 with tokenizer and chat template. Read only: other tests use it, too."""
    from angelforge.exporter.synthetic import small_config, write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), small_config())
