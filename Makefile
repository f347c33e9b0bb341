# Two commands: `make run` trains a first model, `make test` checks everything.
# Both set up .venv by themselves; a second call starts at once.

PYTHON ?= python3
JOBS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input \
	--constraint requirements.lock

# Nothing here phones home.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help run test test-slow lint types contracts mutate fuzz chaos nginx bench arm64-proof lock clean

help: ## Print this list.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/.run ## Train the quickstart; ARGS="rounds=3" overrides any setting.
	@$(BIN)/python -m experiments.train experiment=quickstart downlink=delta $(ARGS)

test: lint types contracts ## Lint, types, layers, then every test that is not slow.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow" $(ARGS)

test-slow: $(VENV)/.dev nginx ## The tests marked slow: real engines, whole training runs.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(ARGS) || [ $$? -eq 5 ] # 5: none is slow

lint: $(VENV)/.dev ## Style: ruff's rules and its format.
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(VENV)/.dev ## Types: mypy, strict.
	@$(BIN)/mypy

contracts: $(VENV)/.dev ## Layers: which package may import which.
	@$(BIN)/lint-imports --no-logo

mutate: $(VENV)/.dev ## Break fedcore/secagg in many ways; every break should fail a test.
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation fedcore/secagg $(ARGS)

fuzz: $(VENV)/.dev ## Throw damaged input at every decoder; ARGS="--minutes 30 --seed 7".
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(ARGS)

chaos: $(VENV)/.dev nginx ## Hurt a real federation at every stage; ARGS="--rounds 20 --seed 7".
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos $(ARGS)

nginx: # The public door of a deployment, which only its tests need: installed where that is possible.
	@command -v nginx >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get update -qq && apt-get install -y -qq nginx-light >/dev/null; } || \
		{ echo "these tests need nginx: apt-get install nginx-light, or what your system calls it" >&2; \
		exit 1; }

bench: $(VENV)/.run ## Measure speed, bytes and memory.
	@$(BIN)/python -m experiments.benchmark $(ARGS)

arm64-proof: $(VENV)/.run ## Train and predict on an emulated 64-bit Arm board; needs root.
	@OMP_NUM_THREADS=1 $(BIN)/python .ci/arm64_proof.py $(ARGS)

lock: $(VENV)/.dev ## Write requirements.lock from what .venv holds now.
	@$(BIN)/python .ci/lock.py

clean: ## Remove .venv, caches and outputs.
	@rm -rf $(VENV) outputs multirun build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache \
		.hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so an interrupted installation is taken up again. torch comes first
# and by its exact version: resolved together with the rest it could be replaced by another build.
$(VENV)/.run: pyproject.toml requirements.lock
	@[ -x $(BIN)/pip ] || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fedcore needs Python 3.11 or newer as $(PYTHON): try make PYTHON=python3.11" >&2; exit 1; }
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV)
	@echo "installing what a run needs (the first time takes some minutes) ..."
	@$(PIP) "$$(grep '^torch==' requirements.lock)"
	@$(PIP) --editable '.[train,device]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "installing what the tests need (the first time takes some minutes) ..."
	@$(PIP) --editable '.[dev]'
	@touch $@
