# Needs Python 3.11, GNU make and git; everything else is installed into .venv. Another interpreter: make PYTHON=/path/to/python3.11
PYTHON ?= python3.11
BIN := $(CURDIR)/.venv/bin
READY := .venv/.ready
export PATH := $(BIN):$(PATH)
# a package of the same name elsewhere on the path would shadow this one
unexport PYTHONPATH

.DEFAULT_GOAL := help
.PHONY: help repro repro-all smoke tiny study full test lab lock

help: ## this list
	@grep -E '^[a-z -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

repro: $(READY) ## run what is out of date of the profile chosen in params.yaml
	@$(BIN)/python -m crab.study.params show
	$(BIN)/dvc repro

repro-all: $(READY) ## the same, training the base again too
	$(BIN)/dvc repro sources
	$(BIN)/dvc repro --single-item --force base
	$(BIN)/dvc repro

smoke tiny full: $(READY) ## choose this profile in params.yaml and run it
	@$(BIN)/python -m crab.study.params choose $@
	$(BIN)/dvc repro

study: $(READY) ## the same for the profile of hours: first the headline, then all else; stopped, it goes on where it was
	@$(BIN)/python -m crab.study.params choose $@
	$(BIN)/dvc repro transfer@study
	$(BIN)/dvc repro

test: $(READY) ## all tests: quick ones on two processes, then the smoke study in a temporary clone
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"
	$(BIN)/python -m pytest -q -m slow

lab: $(READY) ## JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

lock: $(READY) ## write what .venv holds to constraints.txt
	@{ head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable | sed -E 's/\+[a-z0-9.]+$$//'; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt

# The stamp makes set-up a no-op once done; it is written last, so an interrupted one is taken up again.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or give one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet --upgrade 'pip>=24' # older ones cannot resolve the constraints
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
