"""Where Triton cannot be installed, the tests that run kernels are left out."""

from importlib.util import find_spec

KERNELS = ["test_executor.py", "test_precompile.py", "test_run.py", "test_weights.py"]
collect_ignore = [] if find_spec("triton") else KERNELS
