# Everything that a fresh machine with Python 3.11 and make needs.
#
#   make study       environment, then the main job on the built-in sample data
#   make test        environment, lint, types, tests (at most 10 minutes on 2 cores)
#   make test-slow   what is marked slow: faults, servers (at most 30 minutes)
#   make compare BASE=<commit>   whether small studies still give the same results, to the byte

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := .venv.stamp

.PHONY: env study lint test test-slow compare clean

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): several minutes the first time"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

study: env
	$(BIN)/hpsearch study --data sample --out sample-study
	$(BIN)/hpsearch final --best --out sample-study
	@echo
	@echo "See the runs:    cd sample-study && ../$(BIN)/mlflow ui"
	@echo "See the record:  $(BIN)/hpsearch status --study sample --out sample-study"

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

test-slow: env
	$(BIN)/pytest -m 'slow and not gpu'

compare: env
	$(BIN)/python benchmarks/compare.py $(BASE)

clean:
	rm -rf sample-study .mypy_cache .ruff_cache .pytest_cache .hypothesis
