# Everything a stranger needs: `make demo` to see it work, `make test` to check it. Python 3.11+, git and make.

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
# Without --no-compile half of the installation is the translation of modules that nobody imports.
# Many containers forbid Python to keep its translations: each process would then spend seconds on those of transformers.
unexport PYTHONDONTWRITEBYTECODE
PIP = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt

# PyPI's torch for Linux brings gigabytes of CUDA; where there is no NVIDIA card the CPU build is taken instead.
# `make TORCH_INDEX= ...` takes what PyPI has.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)

# The order in which `make test-all` runs the fast tests; make prints it with the command.
SEED ?= $(shell date +%s)

.PHONY: help demo test test-all check bench clean

help:  ## Show this help.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.installed  ## What each of four methods knows and says on the embedded world: table and report (minutes).
	$(BIN)/fedexperts compare experiments/demo/suite.toml --to runs/demo --jobs auto

# Processes that run test files side by side; each test uses one thread.
TEST_JOBS ?= 2
# Tests write, flush and delete some ten thousand small files: in memory where a gigabyte of it is free for files.
TEST_TMP ?= $(shell [ -w /dev/shm ] && [ "$$(df -Pk /dev/shm | awk 'NR == 2 {print $$4}')" -gt 1048576 ] && echo /dev/shm)
PYTEST = $(if $(TEST_TMP),TMPDIR=$(TEST_TMP)) $(BIN)/python -m pytest

test: $(VENV)/.installed-dev  ## The fast tests.
	$(PYTEST) --numprocesses $(TEST_JOBS) --dist loadfile

test-all: $(VENV)/.installed-dev  ## The slow tests, and the fast ones in random order; `SEED=...` repeats an order.
	$(PYTEST) -m "slow and not gpu" --timeout 1200 --numprocesses $(TEST_JOBS) --dist loadfile
	$(PYTEST) --numprocesses $(TEST_JOBS) --dist loadfile --random-order --random-order-seed $(SEED)

check: $(VENV)/.installed-dev  ## Format, lint and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev  ## Speed against the transformers Trainer, the machine's roof and the usual recipe.
	$(PIP) --editable '.[bench]'
	$(BIN)/python -m benchmarks

clean:  ## Remove the environment, the demo's runs and caches; other runs stay.
	rm -rf $(VENV) runs/demo build dist .mypy_cache .ruff_cache .pytest_cache src/*.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer is found; name one: make PYTHON=... $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first, from its index. Each of the two that follow installs the package once, with what it needs.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) $(if $(TORCH_INDEX),--retries 1 --extra-index-url $(TORCH_INDEX)) --no-deps torch
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.torch
	$(PIP) --editable '.[dev,flower,hub,tensorboard,clusters,privacy]'
	@touch $(VENV)/.installed $@
