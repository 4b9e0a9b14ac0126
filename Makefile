# Two commands do everything on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test check bench clean

help: ## what each command does
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1	/' | expand -t 20

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "torchrelay needs Python 3.11 or newer; run: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[examples]' --group dev
	@touch $(READY)

demo: $(READY) ## search the standard library's docstrings by meaning, through three workers
	$(BIN)/python -m examples.docsearch.demo

test: $(READY) ## all tests, on a real server with real workers
	$(BIN)/python -m pytest -n 3 --dist worksteal -m "not alone"
	$(BIN)/python -m pytest -m alone

check: $(READY) ## style, types and the rules between rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY) ## figures against Dramatiq, Celery, RQ, arq and Ray, in the same run
	bash benchmarks/peers/setup.sh
	$(BIN)/python -m benchmarks.hops
	$(BIN)/python -m benchmarks.enqueue
	$(BIN)/python -m benchmarks.latency
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.local
	$(BIN)/python -m benchmarks.row_costs
	$(BIN)/python -m benchmarks.expand
	$(BIN)/python -m benchmarks.handoff

clean: ## remove what the commands above made
	rm -rf $(VENV) .bench build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
