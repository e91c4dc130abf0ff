# `make demo` and `make test` need Python 3.11 or newer and a package index, nothing else.
PYTHON ?= python3
VENV ?= .venv
# Every process here imports torch, and the suite starts hundreds: compiled files, left out below, come with the first import.
unexport PYTHONDONTWRITEBYTECODE
PIP = $(VENV)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint bench clean

demo: $(VENV)/.installed-demo
	$(VENV)/bin/braid demo

# Processes share the cores, so each has one thread.
test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/.installed-bench
	$(VENV)/bin/python benchmarks/spine.py
	$(VENV)/bin/python benchmarks/merge.py
	$(VENV)/bin/python benchmarks/reconstruct.py

clean:
	rm -rf $(VENV) demo-merged

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Braid needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing Braid into $(VENV) (extra: $*); torch is large, so this takes a minute."
	$(PIP) --editable '.[$*]'
	@touch $@
