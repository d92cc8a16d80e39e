# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
# PYTHON chooses the interpreter (3.11 or newer), VENV the environment that it gets.

PYTHON ?= python3
VENV ?= .venv
QUICKSTART_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
# Another minor version of Python makes the environment anew.
INSTALLED := $(VENV)/.installed-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')

.PHONY: help quickstart test lint format install clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(INSTALLED) ## Train, export and try a small GPT on this machine (about 6 minutes on 2 cores)
	@$(BIN)/python tools/quickstart.py $(QUICKSTART_ARGS)

test: $(INSTALLED) ## Run the test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED) ## Check style, types and the layers' import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck slurm/*.sbatch slurm/*.sh .ci/run tests/cluster/cluster.sh

format: $(INSTALLED) ## Format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

install: $(INSTALLED) ## Make the environment only

$(INSTALLED): pyproject.toml tools/constraints.txt
	@echo "Installing megagpt and what it needs into $(VENV) with $$($(PYTHON) --version): once, some minutes"
	@$(PYTHON) -c 'import sys; sys.exit("megagpt needs Python 3.11 or newer; set PYTHON=...") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -qq --upgrade pip
	@$(BIN)/python -m pip install -qq --constraint tools/constraints.txt torch
	@$(BIN)/python -m pip install -qq --constraint tools/constraints.txt --editable '.[test,lint]'
	@touch $@

clean: ## Remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
