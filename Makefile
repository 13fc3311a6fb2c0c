# Every target works on a fresh machine with Python 3.11, 3.12 or 3.13: it makes .venv from requirements.lock
# first, and again whenever the lock has changed. `make test VENV=.venv-3.12 PYTHON=python3.12` uses another one.

VENV ?= .venv
BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed
# The newest Python that runs and can make an environment: a pyenv shim may be there and run nothing,
# and Debian's python3 has no ensurepip until python3-venv is installed.
SUITABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3; do \
	$$name -c '$(SUITABLE)' 2>/dev/null && echo $$name && break; done)
# fewest: one version of a package on all supported Pythons, so that they compute and are checked alike.
LOCK := --universal --python-version 3.11 --fork-strategy fewest --generate-hashes --no-header --no-emit-index-url \
	--no-emit-find-links --quiet
export PATH := $(BIN):$(PATH)
# MLflow and BentoML report their usage unless told not to.
export MLFLOW_DISABLE_TELEMETRY ?= true
export BENTOML_DO_NOT_TRACK ?= true

.DEFAULT_GOAL := help
.PHONY: help setup train promote rollback status serve ui bento image test image-test coverage check docs format bench lock

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo '  Flags go in ARGS: make train ARGS="-P trials=100", make promote ARGS="--dry-run"'

setup: $(INSTALLED)  ## Make .venv from requirements.lock

$(INSTALLED): requirements.lock
	@$(or $(PYTHON),false) -c '$(SUITABLE)' || { echo "error: Python 3.11, 3.12 or 3.13 with the venv module is" \
	  "required, found $(or $(PYTHON),none). Install one, or set PYTHON=/path/to/python3.12" >&2; exit 1; }
	@[ ! -e $(VENV) ] || [ -e $(VENV)/pyvenv.cfg ] || { echo "error: $(VENV) is not a virtual environment." \
	  "Remove it, or set VENV to another folder" >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	@touch $@

train: setup  ## Tune, train, evaluate and register a candidate (flags: -P name=value)
	mlflow run . --env-manager local --experiment-name credit_risk $(ARGS)

promote: setup  ## Judge the candidate and make it answer
	python -m pipeline promote $(ARGS)

rollback: setup  ## Go back to the previously promoted version
	python -m pipeline rollback $(ARGS)

status: setup  ## Show what is promoted, and the history
	python -m pipeline status $(ARGS)

serve: setup  ## Answer requests on port 3000 with the promoted version
	bentoml serve $(ARGS)

ui: setup  ## Compare runs in the MLflow UI on port 5000
	mlflow ui $(ARGS)

bento: setup  ## Build a Bento of the service with the promoted version
	python -m pipeline package $(ARGS)

image: setup  ## Build the container image, with docker, podman or buildah
	python -m pipeline image $(ARGS)

test: setup  ## Run the tests
	python -m pytest -n 2 --dist loadgroup $(ARGS)

image-test: setup  ## Build the image with each builder found, run it and test it (minutes)
	python -m pytest -m image tests/test_image.py $(ARGS)

coverage: setup  ## Run the tests and show which lines they miss
	python -m pytest -n 2 --dist loadgroup --cov --cov-report=term-missing:skip-covered --cov-report=html $(ARGS)

check: setup  ## Format, lint, types and import rules
	ruff format --check .
	ruff check .
	mypy
	lint-imports

docs: setup  ## Build the documentation as a site in site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict $(ARGS)

format: setup  ## Rewrite the code in the project's format
	ruff format .
	ruff check --fix .

bench: setup  ## Measure: recipe, training, scoring, serving, faults (needs a quiet machine)
	for name in recipe training scoring faults tricks serving; do python -m benchmarks.$$name || exit 1; done

lock: setup  ## Resolve both locks from pyproject.toml (every version anew: ARGS=--upgrade)
	uv pip compile pyproject.toml --group dev $(LOCK) $(ARGS) -o requirements.lock
	uv pip compile --group serve -c requirements.lock $(LOCK) $(ARGS) -o requirements.serve.lock
