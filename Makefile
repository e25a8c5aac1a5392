# Two commands do everything on a fresh machine with Python and make:
#   make demo    trains on scikit-learn's digits and ends with a table and figures
#   make test    runs the tests
# Beside them: make lint, make test-slow, make bench, make matrix.
#
# The environment is made once, in $(VENV). PYTHON=/path/to/python uses an existing interpreter instead, which must have
# the package and its `dev` extra installed.

VENV ?= .venv
SYSTEM_PYTHON ?= python3
PYTEST_ARGS ?= -n 2
KEY := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

ifdef PYTHON
RUN := $(PYTHON)
READY :=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready-$(KEY)
endif

# several processes share few cores: more threads each would only wait for one another
export OMP_NUM_THREADS ?= 1
export PYTHONPATH := $(CURDIR)

.PHONY: demo test test-slow lint bench matrix env clean

env: $(READY)

$(VENV)/.ready-$(KEY): pyproject.toml constraints.txt
	test -x $(RUN) || $(SYSTEM_PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	touch $@

demo: $(READY)
	$(RUN) examples/rog.py

test: $(READY)
	$(RUN) -m pytest $(PYTEST_ARGS)

test-slow: $(READY)
	$(RUN) -m pytest $(PYTEST_ARGS) -m slow

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(READY)
	$(RUN) benchmarks/snnl.py
	$(RUN) benchmarks/cka.py
	$(RUN) benchmarks/augmented_dropout.py
	$(RUN) benchmarks/importance_weighting.py
	$(RUN) benchmarks/rog.py
	$(RUN) benchmarks/geometric_scattering.py
	$(RUN) benchmarks/lit.py
	$(RUN) benchmarks/reproducibility.py
	$(RUN) benchmarks/seed_streams.py
	$(RUN) benchmarks/ladder_capsule.py
	$(RUN) benchmarks/learned_optimizer.py

# write the compatibility matrix of the README and the cards from the results of the contract tests
matrix: $(READY)
	$(RUN) -m pytest $(PYTEST_ARGS) tests/contract --write-matrix

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache runs
