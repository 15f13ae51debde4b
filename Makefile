# make train   set up, then the main job on the embedded default: portraits -> shards -> training -> registry
# make test    set up, then lint, types, import contracts and tests
# make campaign  the long tests: faults, restores, installation from a wheel

PYTHON ?= python3
BIN := .venv/bin
S3 := .venv-s3/bin
# Ray Train's workers and the tests must never report usage or ask a registry for anything.
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: train test lint campaign clean

train: .venv/installed
	$(BIN)/nvae shards build portraits:512 store:portraits256 --image-size 256 --validation-fraction 0.125 --if-missing
	$(BIN)/nvae train quickstart

test: .venv/installed .venv-s3/installed lint
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

campaign: .venv/installed .venv-s3/installed
	$(BIN)/python -m pytest -m campaign

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# A real S3 server for the tests, apart from our own environment.
.venv-s3/installed:
	$(PYTHON) -m venv .venv-s3
	$(S3)/python -m pip install --quiet --upgrade pip
	$(S3)/python -m pip install --quiet swift==2.38.3
	touch $@

clean:
	rm -rf .venv .venv-s3 .mypy_cache .ruff_cache .pytest_cache .hypothesis
