# make demo | test | test-full | check | faults | clean. Each sets up what it needs in .venv; PYTHON=... names another Python.
# Works from any directory (make -C FOLDER, make -f FOLDER/Makefile) and in folders with spaces in their name.
ROOT := $(shell cd "$$(dirname "$$(echo '$(MAKEFILE_LIST)' | sed 's/^ *//')")" && pwd)
PYTHON ?= python3
export PYTHON

.PHONY: demo test test-full check faults clean

demo:
	@cd "$(ROOT)" && .ci/setup && .venv/bin/angelforge demo

test: check
	@cd "$(ROOT)" && .venv/bin/python -m pytest -n 2

# Everything that `test` runs, and the longer campaigns, with fresh random examples.
test-full: check
	@cd "$(ROOT)" && .ci/setup full
	@cd "$(ROOT)" && HYPOTHESIS_PROFILE=full .venv/bin/python -m pytest -n 2 -m "full or not full"

check:
	@cd "$(ROOT)" && .ci/setup dev
	@cd "$(ROOT)" && .venv/bin/ruff check . && .venv/bin/ruff format --check .
	@cd "$(ROOT)" && .venv/bin/python -m angelforge.tools.type_check

# The table of planted faults in docs/validation.md.
faults:
	@cd "$(ROOT)" && .ci/setup dev && cd tests && ../.venv/bin/python -m support.fault_table

clean:
	@cd "$(ROOT)" && rm -rf .venv build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@cd "$(ROOT)" && find . -name __pycache__ -type d -prune -exec rm -rf {} +
