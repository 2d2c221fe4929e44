# Each target makes .venv, installs the package into it where something has changed, and runs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-slow test-all test-random bench lint docs docs-check install clean

demo: $(STAMP)
	$(BIN)/pecker-fast demo

# All tests but the slow ones; the slow ones; all of them; all of them with fresh random inputs.
SELECTED :=
test: SELECTED = not slow
test-slow: SELECTED = slow
# The same random inputs in every run; fresh ones in each run of test-random.
test-random: export PECKER_FAST_TEST_SEED = random
# Compiled modules are kept, whatever the environment says: the tests start many interpreters.
test test-slow test-all test-random: export PYTHONDONTWRITEBYTECODE =
test test-slow test-all test-random: $(STAMP)
	$(BIN)/python -m pytest -m "$(SELECTED)" --numprocesses auto --maxprocesses 4 --dist worksteal

bench: $(STAMP)
	$(BIN)/pecker-fast bench

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The packages of the extra "docs". Warnings are errors.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet "mkdocs-material>=9.5" "mkdocstrings[python]>=0.27"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Every command and Python block of the documentation, on small stand-ins for models and data.
docs-check: export PYTHONDONTWRITEBYTECODE =
docs-check: $(STAMP)
	$(BIN)/python -m tests.docs_check

install: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed, $(PYTHON) is older: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "cannot make a virtual environment: install venv (on Debian: apt install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel

# torch first: the extension is built against the torch that it will run with.
$(STAMP): $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet "torch>=2.8" numpy ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test,demo,dev]"
	@touch $@

clean:
	rm -rf $(VENV) build site *.egg-info pecker_fast/*.so pecker_fast/_build.json
