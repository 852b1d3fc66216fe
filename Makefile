# `make demo` and `make test` are all that is needed on a machine with Python >= 3.11, make and git.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-fast theory bench-training clean

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"ganwatch needs Python 3.11 or newer; {sys.executable} is {v.major}.{v.minor}. Name another one: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the pinned packages into .venv/ (a few minutes, once)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: $(READY)
	@$(BIN)/ganwatch demo

test: $(READY)
	@$(BIN)/python -m pytest

test-fast: $(READY)
	@$(BIN)/python -m pytest -m "not slow and not e2e"

theory: $(READY)
	@$(BIN)/python -m training.theory

bench-training: $(READY)
	@PYTHONPATH=. $(BIN)/python tests/benchmarks/bench_training.py

clean:
	rm -rf .venv .ganwatch
