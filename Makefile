# make demo | make test | make check | make help: everything else, the virtual environment included, follows from these.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test check clean

help:  ## say what can be made
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

demo: $(INSTALLED)  ## text to a trained RETRO, measured and sampled from: at most 12 minutes on 2 cores; writes demo/
	$(BIN)/retro demo

test: $(INSTALLED)  ## all tests, at most 8 minutes on 2 cores
	$(BIN)/python -m pytest

check: $(INSTALLED)  ## lint and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## remove what the above made
	rm -rf $(VENV) demo *.egg-info build

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
