# Everything runs in .venv, which is made from pyproject.toml on first use.
#   make book                                   the book, from embedded data and weights
#   make book DATASET=glas DATA_ROOT=PATH       the same on other images
#   make book PRESET=paper DATASET=kbsmc-colon DATA_ROOT=PATH

PRESET    ?=
DATASET   ?=
DATA_ROOT ?=
RUN       ?=
ARGS      ?=

# Threads that wait spin for some microseconds, then sleep. Sleeping at once makes the networks here
# up to twice as slow on an idle machine, spinning on makes them many times slower on a busy one.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 5000

# First Python that is new enough; PYTHON=... overrides.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)

VENV  := $(CURDIR)/.venv
PY    := .venv/bin/python
STAMP := .venv/.installed-$(shell cksum < pyproject.toml | cut -d' ' -f1)
# An environment that was moved, or whose Python is gone, is made anew.
ifneq ($(shell $(PY) -c 'import os, sys; print(os.path.samefile(sys.prefix, "$(VENV)"))' 2>/dev/null),True)
BROKEN := broken-environment
endif

EXECUTE = $(PY) -m helpers.execute $(if $(PRESET),--preset "$(PRESET)") $(if $(RUN),--run "$(RUN)") \
	$(if $(DATASET),--dataset "$(DATASET)") $(if $(DATA_ROOT),--data-root "$(DATA_ROOT)") $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help env book run test bench lab lint format clean distclean parameters broken-environment

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | \
		awk -F'|' '{ printf "  make %-11s %s\n", $$1, $$2 }'
	@echo
	@echo "  variables: PRESET=smoke|tutorial|paper (tutorial, or that of RUN)  DATASET=name  DATA_ROOT=folder  RUN=name"
	@echo "             ARGS='--only 05 -p steps 100'  PYTHON=python3.12"

env: $(STAMP) ## set up .venv

$(STAMP): $(BROKEN)
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found: install one, or give PYTHON=path" >&2; exit 1; }
	@echo "setting up .venv with $(PYTHON) (first time: some minutes)"
	@$(if $(BROKEN),$(PYTHON) -m venv --clear .venv,test -x $(PY) || $(PYTHON) -m venv .venv)
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[book,test]'
	@rm -f .venv/.installed-*
	@touch $@

book: $(STAMP) ## run the chapters that are out of date, build book/_build/html/index.html
	@$(EXECUTE) --book

run: $(STAMP) ## run the chapters only
	@$(EXECUTE)

test: $(STAMP) ## run all tests
	@$(PY) -m pytest -q $(ARGS)

bench: $(STAMP) ## print the benchmark tables, about 8 minutes on 2 idle cores (ARGS=bench_phase1: one)
	@$(PY) -m tests.benchmarks $(ARGS)

lab: $(STAMP) ## open the notebooks in JupyterLab
	@$(PY) -m jupyter lab notebooks

parameters: $(STAMP) ## list all parameters of all chapters
	@$(PY) -m helpers.execute --parameters

lint: $(STAMP) ## check style of code and notebooks
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m nbstripout --keep-id --verify notebooks/*.ipynb

format: $(STAMP) ## mend style of code and notebooks
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .
	@$(PY) -m nbstripout --keep-id notebooks/*.ipynb

clean: ## remove the built book, executed chapters and runs
	rm -rf book/_build book/chapters data/runs .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf .venv *.egg-info
