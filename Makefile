# `make demo` and `make test` need Python >= 3.11 and make, nothing else: they set up .venv and reuse it.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo test test-parity lint format bench notebooks docs docs-serve clean

help:
	@echo "make demo       sample a tilt with every method, print the table, draw the figure (tilt.png)"
	@echo "make test       run the test suite"
	@echo "make test-parity  compare the port of FLUX.1 with diffusers and transformers, in an environment of its own"
	@echo "make lint       check format, lint and types"
	@echo "make format     format the sources"
	@echo "make bench      reproduce the tables of benchmarks/results"
	@echo "make notebooks  run the notebooks and write their outputs into them"
	@echo "make docs       build the documentation in site/; a warning is an error"
	@echo "make docs-serve  show it at http://127.0.0.1:8000, and build again when a page changes"
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
	$(BIN)/python benchmarks/gaussian_tilt.py
	$(BIN)/python benchmarks/cost_to_floor.py
	$(BIN)/python benchmarks/two_modes.py
	$(BIN)/python benchmarks/checkerboard.py
	$(BIN)/python benchmarks/any_reward.py
	$(BIN)/python benchmarks/learned.py
	$(BIN)/python benchmarks/predictions.py
	$(BIN)/python benchmarks/weighted.py
	$(BIN)/python benchmarks/unbiased.py
	$(BIN)/python benchmarks/audits.py
	$(BIN)/python benchmarks/toys.py
	$(BIN)/python benchmarks/toys_learned.py
	$(BIN)/python benchmarks/pareto.py
	$(BIN)/python benchmarks/blackbox.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/external.py
	$(BIN)/python benchmarks/text.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/annealing.py
	$(BIN)/python benchmarks/many_particles.py
	$(BIN)/python benchmarks/smc_scaling.py
	$(BIN)/python benchmarks/flux_memory.py

notebooks: $(READY)
	$(BIN)/python notebooks/execute.py notebooks/*.ipynb

docs: $(READY)
	$(BIN)/python -m mkdocs build --strict $(ARGS)

docs-serve: $(READY)
	$(BIN)/python -m mkdocs serve $(ARGS)

clean:
	rm -rf .venv .venv-parity site build dist *.egg-info .pytest_cache .ruff_cache
