# Development tasks. `make help` lists them.
#
# A fresh machine needs make, a C compiler and Python 3.11, 3.12 or 3.13.

# The newest Python that runs. Override it with `make PYTHON=/path/to/python`.
PYTHON ?= $(firstword $(foreach name,python3.13 python3.12 python3.11 python3,$(shell \
	$(name) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1 && echo $(name))))
VENV := .venv
BIN := $(VENV)/bin
STAMP := .venv.stamp

.DEFAULT_GOAL := help
.PHONY: help env study format lint test test-slow compare bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-22s %s\n", $$1 ($$1 == "compare" ? " BASE=<commit>" : ""), $$2 }' $(MAKEFILE_LIST)

env: $(STAMP) ## create the environment in .venv (several minutes the first time)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || test -n "$(PYTHON)" || \
		{ echo "No Python 3.11, 3.12 or 3.13 was found. Install one, or pass its path: make PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): several minutes the first time"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

study: env ## run a search and its final on built-in sample data (minutes on two cores)
	$(BIN)/hpsearch study --data sample --out sample-study
	$(BIN)/hpsearch final --best --out sample-study
	@echo
	@echo "See the runs:    cd sample-study && ../$(BIN)/mlflow ui"
	@echo "See the record:  $(BIN)/hpsearch status --study sample --out sample-study"

format: env ## format the code, sort imports, apply safe fixes
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

lint: env ## check format, lint rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint ## lint, then run the fast tests (at most 10 minutes on two cores)
	$(BIN)/pytest

test-slow: env ## run the slow tests: faults, servers, whole commands (at most 30 minutes)
	$(BIN)/pytest -m 'slow and not gpu'

compare: env ## check that small studies give byte-identical results at BASE and here
	$(BIN)/python benchmarks/compare.py $(BASE)

bench: env ## run the short form of the benchmarks
	$(BIN)/python benchmarks/throughput.py --quick
	$(BIN)/python benchmarks/study.py --quick
	$(BIN)/python benchmarks/study_statistics.py --quick

clean: ## remove the sample study and the caches of the tools
	rm -rf sample-study .mypy_cache .ruff_cache .pytest_cache .hypothesis
