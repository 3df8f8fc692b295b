"""What all tests share: hypothesis profiles. Helpers are in `tests/support`, imported as `from support.x import y`."""

import os

from hypothesis import settings

# The same examples in every run of `make test`, so that it never fails by chance; `make test-full` looks for new ones.
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("full", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
