# Everything is installed into .venv, once; a target that has nothing to do takes no time.

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,$(shell \
  $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))) none)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_INDEX_OPTION := $(TORCH_INDEX:%=--extra-index-url %)

# Ray and MLflow would report usage.
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true

.DEFAULT_GOAL := help
.PHONY: help train test lint campaign faults faults-data faults-search faults-import faults-registry faults-promotion bench-data bench-formats bench-overhead bench-divergence bench-search bench-registry bench-importance clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s%s\n", $$1, $$2}' Makefile

train: .venv/installed  ## set up, then the main job: portraits -> shards -> training -> registry
	$(BIN)/nvae shards build portraits:512 store:portraits256 --image-size 256 --validation-fraction 0.125 --if-missing
	$(BIN)/nvae train quickstart

# Two files at a time: half of the time is waiting for processes that start, die and come back.
test: lint .venv-s3/installed  ## set up, then lint, types, import contracts and tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/installed  ## style, types and import contracts alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

campaign: .venv/installed .venv-s3/installed  ## everything that takes hours: the long tests and all campaigns of faults
	@trap 'exit 130' INT; failed=; \
	$(BIN)/python -m pytest -m campaign || failed="$$failed, pytest -m campaign"; \
	$(MAKE) faults || failed="$$failed, make faults"; \
	$(MAKE) faults-data || failed="$$failed, make faults-data"; \
	$(MAKE) faults-search || failed="$$failed, make faults-search"; \
	$(MAKE) faults-import || failed="$$failed, make faults-import"; \
	$(MAKE) faults-registry || failed="$$failed, make faults-registry"; \
	$(MAKE) faults-promotion || failed="$$failed, make faults-promotion"; \
	if [ -n "$$failed" ]; then echo "FAILED: $${failed#, }"; exit 1; fi; \
	echo "All passed: pytest -m campaign, make faults, make faults-data, make faults-search, make faults-import, make faults-registry, make faults-promotion"

faults: .venv/installed .venv-s3/installed  ## faults of a training, real processes killed: tried, survived, images lost
	$(BIN)/python -m tests.faults.training $(if $(ONLY),--only $(ONLY)) $(if $(SEED),--seed $(SEED))

faults-data: .venv/installed .venv-s3/installed  ## faults and hostile inputs of the data path: tried, survived
	$(BIN)/python -m tests.faults.data $(if $(ONLY),--only $(ONLY))

faults-search: .venv/installed  ## searches whose driver is killed: trials lost, doubled, changed
	$(BIN)/python -m tests.faults.search $(if $(ONLY),--only $(ONLY)) $(if $(SEED),--seed $(SEED))

faults-import: .venv/installed  ## hostile and damaged checkpoints through nvae import: tried, refused
	$(BIN)/python -m tests.faults.importing $(if $(ONLY),--only $(ONLY)) $(if $(SEED),--seed $(SEED))

faults-registry: .venv/installed  ## hostile names, tags, places and versions through the registry's commands: tried, refused
	$(BIN)/python -m tests.faults.registry $(if $(ONLY),--only $(ONLY))

faults-promotion: .venv/installed  ## a hundred promotions at once, killed amid; entries lost, doubled; the wrong champion
	$(BIN)/python -m tests.faults.promotion $(if $(ONLY),--only $(ONLY)) $(if $(SEED),--seed $(SEED))

bench-data: .venv/installed .venv-s3/installed  ## the loader beside stock WebDataset and the machine's bounds
	$(BIN)/python -m tests.benchmarks.data

bench-formats: .venv/installed  ## bytes and speed of image formats and their decoders
	$(BIN)/python -m tests.benchmarks.formats

bench-overhead: .venv/installed  ## a run, and Ray Train, beside bare loops on the same model
	$(BIN)/python -m tests.benchmarks.overhead

bench-divergence: .venv/installed  ## a training that diverges, and how it is kept from it
	$(BIN)/python -m tests.benchmarks.divergence --picture configs/divergence.png

bench-search: .venv/installed  ## random search with early stopping and without
	$(BIN)/python -m tests.benchmarks.search

bench-importance: .venv/installed  ## importance weights by shared draws beside full forwards
	$(BIN)/python -m tests.benchmarks.importance

bench-registry: .venv/installed  ## finding models among 10,000 versions
	$(BIN)/python -m tests.benchmarks.registry

clean:  ## remove what was installed and cached; runs and models in nvae-store stay
	rm -rf .venv .venv-s3 .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c '' 2>/dev/null || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv

# The default registry has only CUDA builds of torch for Linux, gigabytes that are of no use
# without a GPU. So a machine without one must be offered a CPU build (by pip's own settings or
# by TORCH_INDEX), or is asked before anything is fetched.
.venv/torch: .venv/bin/python constraints.txt
	@if [ "$$(uname -s)" = Linux ] && [ -z "$(TORCH_CUDA)" ] \
	  && ! [ -e /dev/nvidia0 ] && ! command -v nvidia-smi >/dev/null \
	  && ! $(PIP) index versions torch $(TORCH_INDEX_OPTION) \
	  | grep -q 'Available.*[ ,]$(TORCH_VERSION)+cpu'; then \
	  echo "No GPU here, and pip offers no CPU build of torch $(TORCH_VERSION), only gigabytes of CUDA. Give the index"; \
	  echo "of CPU wheels that PyTorch's installation page names, make TORCH_INDEX=URL, or accept CUDA: make TORCH_CUDA=1"; \
	  exit 1; fi
	$(PIP) install --quiet --constraint constraints.txt $(TORCH_INDEX_OPTION) torch
	touch $@

.venv/installed: .venv/torch pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# A real S3 server for the tests, apart from our own environment.
.venv-s3/installed: .venv/bin/python constraints.txt
	$(BIN)/python -m venv .venv-s3
	.venv-s3/bin/python -m pip install --quiet --constraint constraints.txt swift
	touch $@
