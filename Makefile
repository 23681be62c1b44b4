# Everything from a fresh machine with Python 3.11 or newer: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= runs/pocket

# The pocket recipe is timed with two threads; on a busy machine one is faster.
export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-first test-second lint format check clean

help:
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

venv: $(STAMP) ## make .venv with everything installed, when it is stale

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: venv ## train and judge the pocket model, on all benchmarks; prints where the reports are
	$(BIN)/pumice run pocket --out $(OUT)
	$(BIN)/pumice eval $(OUT)/tune --bench all --limit 100 --data $(OUT)/data --out $(OUT)/benchmarks
	@echo "Open $(OUT)/report.html and $(OUT)/benchmarks/report.html in a browser."

lint: venv ## ruff, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes of one thread each: on two cores half the time of one after the other.
FIRST := $(wildcard tests/test_[a-k]*.py)
SECOND := $(filter-out $(FIRST),$(wildcard tests/test_*.py))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider

test: lint ## lint, then every test
	@echo "Every test, in two halves; each says what it found when it is through (about ten minutes)."
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target --keep-going test-first test-second

test-first: venv
	$(PYTEST) $(FIRST)

test-second: venv
	$(PYTEST) $(SECOND)

check: test ## everything CI runs, then doctor
	$(BIN)/pumice doctor

format: venv ## format the code and sort the imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and the caches, not the runs
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
