# Everything needs only `make` and a Python in range; PYTHON=... names another one.
IN_RANGE := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(IN_RANGE)' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# The tests use what is on this disk and nothing else, and two cores, a thread on each.
export HF_HUB_OFFLINE ?= 1
# Neighbours share what they are tried on, so a process takes half of the tests, then what is left.
# The many processes that tests start find our modules compiled, whatever the environment says.
PYTEST := $(BIN)/python -m compileall -q rlhf_cli && OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install lock demo check test test-slow test-gpu interop bench lint format type wheel

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/installed ## .venv with the pinned versions and rlhf-cli, editable

# All that is installed has a hash in requirements/, what building takes too. PyTorch is the build for
# CPUs where pip is offered the file of that hash. uv is needed for `make lock` alone.
LOCKS := $(wildcard requirements/*.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOCKED := $(PIP) install --quiet --require-hashes --no-deps --no-build-isolation --use-pep517
TORCH_ON_CPU := sed -n '/^torch==/,$$p' requirements/cpu.txt

$(VENV)/installed: pyproject.toml $(LOCKS)
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.13 found; name one: make PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(LOCKED) -r requirements/build.txt
	$(TORCH_ON_CPU) | $(LOCKED) --dry-run -r /dev/stdin >/dev/null 2>&1 && lock=cpu || lock=default; \
		$(LOCKED) -r requirements/$$lock.txt
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@$(PIP) check
	@touch $@

lock: ## requirements/ again, after pyproject.toml changed; UPGRADE=1 for newer versions
	$(PYTHON) requirements/lock.py $(if $(UPGRADE),--upgrade)

demo: install ## the whole chain on the shipped rows, in a few minutes
	PATH="$(CURDIR)/$(BIN):$$PATH" recipes/demo.sh

test: lint type ## lint, types and the fast tests: what a change must pass
	$(PYTEST)

check: test ## the same as test

test-slow: install ## the tests that take minutes
	$(PYTEST) -m slow

test-gpu: install ## what only a GPU can show, in minutes
	$(PYTEST) -m gpu

# Beside the rest in .venv: nothing of it is another version there.
$(VENV)/interop: $(VENV)/installed requirements/interop.txt
	$(LOCKED) -r requirements/interop.txt
	@$(PIP) check
	@touch $@

interop: $(VENV)/interop ## the tests with TRL, lm-eval, peft and pipelines, in minutes
	$(PYTEST) -m interop

# Of TRL alone, since what it needs is there; where it cannot be had, its sides are said to be skipped.
TRL := sed -n '/^trl==/,/[^\\]$$/p' requirements/interop.txt

bench: install ## our jobs beside TRL's and transformers', in minutes
	-$(TRL) | $(LOCKED) -r /dev/stdin
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed.py --repeat 2

lint: install ## format and lint, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: install ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

type: install ## static types
	$(BIN)/mypy

# What building takes, in an environment of its own: no PyTorch is needed for it.
BUILD := .venv-build
BUILDING := $(BUILD)/bin/python -m pip --disable-pip-version-check
$(BUILD)/installed: requirements/build.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.13 found; name one: make PYTHON=..." >&2; exit 1; }
	@test -x $(BUILD)/bin/python || $(PYTHON) -m venv $(BUILD)
	$(BUILDING) install --quiet --require-hashes --no-deps --no-build-isolation -r requirements/build.txt
	@touch $@

wheel: $(BUILD)/installed ## dist/*.whl, in seconds
	$(BUILDING) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
