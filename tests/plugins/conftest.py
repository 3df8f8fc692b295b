"""Where Triton cannot be installed, the tests that run kernels are left out."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["test_interpreter.py", "test_kernels_*.py"]
