# `make demo` and `make test` need Python >= 3.11 and make, nothing else: they set up .venv and reuse it.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo test test-slow test-nightly test-notebooks test-parity test-oldest test-newest smoke soak nightly lint format bench notebooks docs docs-serve clean

help:
	@echo "make demo       sample a tilt with every method, print the table, draw the figure (tilt.png)"
	@echo "make test       run the tests, but for the slow ones and the notebooks"
	@echo "make test-slow  run the slow tests"
	@echo "make test-nightly  run the slowest tests"
	@echo "make test-notebooks  run every notebook in a reduced size"
	@echo "make test-parity  compare the port of FLUX.1 with diffusers and transformers, in an environment of its own"
	@echo "make test-oldest, make test-newest  a part of the suite on the oldest dependencies allowed, and on the newest there are"
	@echo "make smoke      build the wheel, install it elsewhere and use it there"
	@echo "make soak       the suite twenty times, each in another random order"
	@echo "make nightly    all that takes long: test-nightly, soak, test-oldest, test-newest, smoke"
	@echo "make lint       check format, lint, layers and types"
	@echo "make format     format the sources"
	@echo "make bench      run the benchmarks, write their tables (ARGS=--quick: on a small scale)"
	@echo "make notebooks  run the notebooks and write their outputs into them"
	@echo "make docs       build the documentation in site/; a warning is an error"
	@echo "make docs-serve  show it at http://127.0.0.1:8000, and build again when a page changes"
	@echo "make clean      remove the environment and everything built"

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tiltjax needs Python 3.11 or newer, $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[plot,transport,fit]" --group dev
	@touch $(READY)

demo: $(READY)
	$(BIN)/tiltjax demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal -m "slow and not nightly" $(ARGS)

test-nightly: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal -m nightly $(ARGS)

test-notebooks: $(READY)
	$(BIN)/python -m pytest tests/notebooks -n auto --dist worksteal $(ARGS)

# Says which order failed: `make test ARGS=--shuffle=SEED` is the same again. What one run compiles the next ones read.
SEED ?= $(shell date +%y%m%d)
SOAKS ?= 20
soak: $(READY)
	@programs=$$(mktemp -d); failed=; \
	for i in $$(seq $(SOAKS)); do \
	  seed=$$(($(SEED)00 + i)); echo "soak $$i of $(SOAKS): --shuffle=$$seed"; \
	  JAX_COMPILATION_CACHE_DIR=$$programs $(BIN)/python -m pytest -q -n auto --dist worksteal --shuffle=$$seed $(ARGS) || failed="$$failed $$seed"; \
	done; rm -rf $$programs; \
	if [ -n "$$failed" ]; then echo "failed in the orders$$failed: make test ARGS=--shuffle=SEED"; exit 1; fi

# What breaks first where a dependency changes: every interface to JAX, Equinox, Diffrax, Flax, Optax and SciPy, in a few minutes, without PyTorch.
PART := $(addprefix tests/,$(addsuffix .py,$(addprefix test_,interpolants mixtures posteriors resampling progress checks) \
	$(addprefix samplers/test_,flow selection) models/test_network training/test_lora images/test_transformer search/test_surrogates \
	$(addprefix theory/test_,tilts distances thermodynamic)))
OLDEST := .venv-oldest/bin
NEWEST := .venv-newest/bin
$(OLDEST)/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(OLDEST)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; o = p["optional-dependencies"]; \
	  print("\n".join(d.replace(">=", "==") for d in p["dependencies"] + o["plot"] + o["transport"]))' > .venv-oldest/bounds.txt
	$(OLDEST)/python -m pip install --quiet --constraint .venv-oldest/bounds.txt --editable ".[plot,transport]" --group core
	@touch $@

# Resolved anew each time: what is newest changes.
.PHONY: $(NEWEST)/.ready
$(NEWEST)/.ready:
	$(PYTHON) -m venv .venv-newest
	$(NEWEST)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(NEWEST)/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[plot,transport]" --group core

test-oldest: $(OLDEST)/.ready
test-newest: $(NEWEST)/.ready
test-oldest test-newest: test-%:
	.venv-$*/bin/python -m pip list | grep -Ei "^(jax|jaxlib|equinox|diffrax|flax|optax|chex|numpy|scipy) "
	.venv-$*/bin/python -m pytest -n auto --dist worksteal -k "not from_torch" $(PART) $(ARGS)

# The wheel in an environment that has its dependencies from ours and itself from nowhere else; nothing is downloaded.
smoke: $(READY)
	rm -rf build/smoke && mkdir -p build/smoke
	$(BIN)/python -W error -c "import tiltjax, theory, tiltjax.images"
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/smoke .
	$(BIN)/python -m venv --without-pip build/smoke/venv
	$(BIN)/python -c 'import sysconfig, pathlib; here = sysconfig.get_path("purelib"); \
	  there, = pathlib.Path("build/smoke/venv").glob("lib/python*/site-packages"); (there / "dependencies.pth").write_text(here)'
	$(BIN)/python -m pip --python build/smoke/venv/bin/python install --quiet --no-deps --no-index build/smoke/*.whl
	cd build/smoke && venv/bin/python -I -W error ../../tests/smoke.py && venv/bin/tiltjax --version

nightly: test-nightly soak test-oldest test-newest smoke

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
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks.run $(ARGS)
	$(BIN)/python -m benchmarks.tables

notebooks: $(READY)
	$(BIN)/python notebooks/execute.py notebooks/*.ipynb

docs: $(READY)
	$(BIN)/python -m mkdocs build --strict $(ARGS)

docs-serve: $(READY)
	$(BIN)/python -m mkdocs serve $(ARGS)

clean:
	rm -rf .venv .venv-parity .venv-oldest .venv-newest site build dist *.egg-info .pytest_cache .ruff_cache
