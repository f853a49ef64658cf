# `make help` lists the targets. Works with GNU make 3.81 or newer and any POSIX shell.
#
#   VENV=.venv            where the environment lies
#   PYTHON=python3.12     the Python it is made with, instead of the first one found that is new enough
#   PY=python             use the active environment (conda, say) and make none: make report PY=python
#   PROFILE=quick         which section of profiles/ the report runs
#   CLUSTER=slurm         train on Slurm, or on Dask: CLUSTER=tcp://host:8786
#   DEVICE=cuda           train on a GPU
#   ARGS=...              more arguments for annealed_report or pytest

VENV ?= .venv
PROFILE ?= quick
ARGS ?=
API ?= build/api
modules = $(subst /,.,$(basename $(wildcard annealed_core/[a-z]*.py annealed_core/*/[a-z]*.py)))
where = $(if $(CLUSTER), --cluster $(CLUSTER))$(if $(DEVICE), --device $(DEVICE))

ifeq ($(PY),)
PY := $(VENV)/bin/python
SETUP := $(VENV)/.annealed-installed
endif

# A kernel installed for the user must not come before this environment's.
export JUPYTER_PREFER_ENV_PATH = 1
# Each kernel and worker imports some thousand modules: 5 s from stored bytecode, 11 s without.
export PYTHONDONTWRITEBYTECODE =

find_python = $(shell for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
    version=`"$$python" -c 'import sys; print(sys.version_info[0] * 100 + sys.version_info[1])' 2>/dev/null`; \
    if [ "$$version" -ge 311 ] 2>/dev/null; then command -v "$$python"; break; fi; done)

too_old = annealed_core needs Python 3.11 or newer, and $(or $(PYTHON),python3) is not: \
    install one, or name it with PYTHON=/path/to/python3.11

# uv as a command, or the one that set-up put into the environment
uv = $(if $(shell uv --version 2>/dev/null),uv,$(PY) -m uv)

.DEFAULT_GOAL := help
.PHONY: help setup report record audit test stress api lab notebooks lint lock clean distclean

help: ## List the targets, with the time they take on two cores
	@echo "usage: make TARGET [PROFILE=quick|full] [PY=python: use the active environment]"
	@sed -n 's/^\([a-z]*\):[^#]*## /\1 /p' $(firstword $(MAKEFILE_LIST)) | while read -r name text; do printf '  %-10s %s\n' "$$name" "$$text"; done

setup: $(SETUP) ## Make .venv from requirements.lock [30 s, 5 s if uv has the packages, 0 s when nothing changed]

report: $(SETUP) ## Run the notebooks into build/report/PROFILE/index.html [quick: 3 to 7 min; half a minute where nothing changed]
	@$(PY) -m annealed_report --profile $(PROFILE)$(where) $(ARGS)

record: $(SETUP) ## Run the full profile and write its figures to results/, to be committed [12 h; can be stopped, and goes on]
	@ANNEALED_RECORD=1 $(PY) -m annealed_report --profile full$(where) $(ARGS)

audit: $(SETUP) ## Run a random twentieth of the committed results again, and show how far they lie apart [20 min]
	@$(PY) -m annealed_report.audit $(ARGS)

test: lint ## All checks: lint, unit tests, quick report, notebooks against their outputs, built pages [8 to 20 min]
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal tests $(ARGS)
	$(PY) -m annealed_report --profile quick
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --nbval notebooks
	ANNEALED_PAGES=build/report/quick $(PY) -m pytest -n 2 tests/test_report.py -k built_report

stress: $(SETUP) ## What takes long: kills, random input, wheels on other Pythons and both ends of torch [1 h]
	HYPOTHESIS_PROFILE=stress OMP_NUM_THREADS=1 $(PY) -m pytest -m stress tests $(ARGS)

api: $(SETUP) ## Pages of the library from its docstrings: build/api/index.html [20 s]
	@$(PY) -c 'import pdoc' 2>/dev/null || $(uv) pip install --quiet --python $(PY) 'pdoc>=15'
	@$(PY) -m pdoc --docformat google --output-directory $(API) annealed_core $(modules) 2>/dev/null
	@echo $(API)/index.html

lab: $(SETUP) ## Open the notebooks in JupyterLab
	@$(PY) -m jupyter lab notebooks

notebooks: $(SETUP) ## Run the notebooks and store their outputs in notebooks/, to be committed [5 min; seconds where nothing changed]
	@$(PY) -m annealed_report --store-outputs $(ARGS)

lint: $(SETUP) ## Style and types: ruff, mypy [10 s]
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

lock: $(SETUP) ## Write requirements.lock again from pyproject.toml; ARGS=--upgrade for newer versions [10 s]
	@$(uv) pip compile --quiet --universal --python-version 3.11 --extra report --extra test \
	    --no-header --no-emit-index-url --no-emit-find-links $(ARGS) --output-file requirements.lock pyproject.toml

clean: ## Delete build/ and caches; runs/, where trained models are kept, stays
	@rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find annealed_core annealed_report tests notebooks bench -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) \
	    -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## Delete also .venv; runs/ stays
	@rm -rf annealed_core.egg-info
	@if [ -e "$(VENV)/.annealed" ]; then rm -rf "$(VENV)"; fi

# .annealed marks an environment that this file made: one without .annealed-installed was interrupted and is made anew.
# Environments of other origin are only ever added to.
$(VENV)/.annealed-installed: requirements.lock pyproject.toml
	$(if $(find_python),,$(error $(too_old)))
	@echo "Installing requirements.lock into $(VENV) (the first time a download of 3 GB on Linux, mostly torch) ..."
	@if [ -e "$(VENV)/.annealed" ] && [ ! -e "$@" ]; then rm -rf "$(VENV)"; fi
	@if [ ! -e "$(VENV)" ]; then mkdir -p "$(VENV)" && touch "$(VENV)/.annealed"; fi
	@rm -f "$@"
	@set -e; python='$(find_python)'; \
	if uv --version >/dev/null 2>&1; then \
	    uv=uv; [ -e "$(VENV)/bin/python" ] || uv venv --quiet --allow-existing --python "$$python" "$(VENV)"; \
	else \
	    uv="$(VENV)/bin/python -m uv"; [ -e "$(VENV)/bin/python" ] || "$$python" -m venv "$(VENV)"; \
	    "$(VENV)/bin/python" -m pip --disable-pip-version-check install --quiet uv; \
	fi; \
	$$uv pip install --quiet --python "$(VENV)/bin/python" --requirement requirements.lock; \
	$$uv pip install --quiet --python "$(VENV)/bin/python" --no-deps --editable .
	@touch "$@"
