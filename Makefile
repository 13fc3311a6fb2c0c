# Every target works on a fresh machine with Python 3.11: it makes .venv from requirements.lock first,
# and again whenever the lock has changed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
LOCK := --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url --no-emit-find-links --upgrade --quiet
export PATH := $(CURDIR)/$(BIN):$(PATH)
# MLflow and BentoML report their usage unless told not to.
export MLFLOW_DISABLE_TELEMETRY ?= true
export BENTOML_DO_NOT_TRACK ?= true

.DEFAULT_GOAL := help
.PHONY: help setup train promote rollback status serve ui bento test check format bench lock

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo '  Flags go in ARGS: make train ARGS="-P trials=100", make promote ARGS="--dry-run"'

setup: $(INSTALLED)  ## Make .venv from requirements.lock

$(INSTALLED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "error: Python 3.11 is needed, found $$($(PYTHON) --version 2>&1); set PYTHON=/path/to/python3.11" >&2; exit 1; }
	rm -rf .venv
	$(PYTHON) -m venv .venv
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

test: setup  ## Run the tests
	python -m pytest -n 2 --dist loadgroup $(ARGS)

check: setup  ## Format, lint, types and import rules
	ruff format --check .
	ruff check .
	mypy
	lint-imports

format: setup  ## Rewrite the code in the project's format
	ruff format .
	ruff check --fix .

bench: setup  ## Measure: recipe, training, scoring, serving, faults (needs a quiet machine)
	for name in recipe training scoring faults serving; do python -m benchmarks.$$name || exit 1; done

lock: setup  ## Resolve both locks anew from pyproject.toml
	uv pip compile pyproject.toml --group dev $(LOCK) -o requirements.lock
	uv pip compile --group serve -c requirements.lock $(LOCK) -o requirements.serve.lock
