# `make demo` and `make test` need Python >= 3.11 and make, nothing else: they set up .venv and reuse it.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo test test-parity lint format bench notebooks clean

help:
	@echo "make demo       sample a tilt with every method, print the table, draw the figure (tilt.png)"
	@echo "make test       run the test suite"
	@echo "make test-parity  compare the port of FLUX.1 with diffusers and transformers, in an environment of its own"
	@echo "make lint       check format, lint and types"
	@echo "make format     format the sources"
	@echo "make bench      run the benchmarks, write their table (ARGS=--quick: on a small scale)"
	@echo "make notebooks  run the notebooks and write their outputs into them"
	@echo "make clean      remove the environment and everything built"

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tiltjax needs Python 3.11 or newer, $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[plot,transport]" --group dev
	@touch $(READY)

demo: $(READY)
	$(BIN)/python -m tiltjax $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

PARITY := .venv-parity/bin
$(PARITY)/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-parity
	$(PARITY)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(PARITY)/python -m pip install --quiet --editable . --group parity
	@touch $@

test-parity: $(PARITY)/.ready
	$(PARITY)/python -m pytest tests/parity $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/run.py $(ARGS)

notebooks: $(READY)
	$(BIN)/python notebooks/execute.py notebooks/*.ipynb

clean:
	rm -rf .venv .venv-parity build dist *.egg-info .pytest_cache .ruff_cache
