# Two commands do everything on a fresh machine with Python 3.11 to 3.13: `make demo` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-benchmarks test-all services check format bench clean lock

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(READY) ## Create the environment from the lock file

$(READY): requirements.lock pyproject.toml hatch_build.py $(wildcard platform/heliostat/*/_*.c)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.8'
	@# Compiled once: where Python is told to write no bytecode, every process and each of Ray's workers would do it again.
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode -r requirements.lock
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --refresh-package heliostat -e .
	$(BIN)/python -m compileall -q platform deployments jobs configs benchmarks tests
	@touch $@

demo: $(READY) ## From raw purchases to served predictions, on real data, in a few minutes
	@exec $(BIN)/python jobs/demo.py

# What only computes runs on all processors at once; what waits, and is waited for, alone.
test: $(READY) ## All tests but the slow ones
	@$(BIN)/python -m pytest -m "not slow" -q -n auto --dist worksteal tests/unit
	@exec $(BIN)/python -m pytest -m "not slow" -q tests/contract tests/integration

test-slow: $(READY) ## The slow tests alone, without whole benchmarks
	@$(BIN)/python -m pytest -m "slow and computes" -q -n auto --dist worksteal
	@exec $(BIN)/python -m pytest -m "slow and not computes and not benchmark" -q

test-benchmarks: $(READY) ## Each benchmark that starts servers, as small as it gets
	@exec $(BIN)/python -m pytest -m benchmark -q

services: ## Install what some contract tests need and no Python package brings: PostgreSQL and Prometheus, from Debian's packages
	@command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
			&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends postgresql; } \
		|| echo "PostgreSQL can't be installed here (that needs root and apt-get); its tests are skipped." >&2
	@# Only unpacked: to install it would start it.
	@command -v promtool >/dev/null || [ -x $(BIN)/promtool ] \
		|| { mkdir -p $(BIN) && cd $(BIN) && { apt-get download -qq prometheus 2>/dev/null \
			|| { apt-get update -qq && apt-get download -qq prometheus; }; } \
			&& dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x --strip-components=3 ./usr/bin/prometheus ./usr/bin/promtool \
			&& rm prometheus_*.deb; } 2>/dev/null \
		|| echo "Prometheus can't be had here (that needs apt-get); its tests are skipped." >&2

test-all: services test test-slow test-benchmarks ## All tests

check: $(READY) ## Formatting, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) ## Benchmarks side by side with what a user would pick instead
	$(BIN)/python benchmarks/point_in_time.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/serving.py --parts
	$(BIN)/python benchmarks/scoring_servers.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/footprint.py
	$(BIN)/python benchmarks/chaos.py
	$(BIN)/python benchmarks/ingestion.py
	$(BIN)/python benchmarks/online_read.py
	$(BIN)/python benchmarks/materialization.py
	$(BIN)/python benchmarks/feast_join.py
	$(BIN)/python benchmarks/compared.py
	$(BIN)/python benchmarks/sizing.py

lock: $(READY) ## Write the lock file anew
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra demo --extra kafka --extra dev \
		--no-header --no-annotate pyproject.toml -o requirements.lock --upgrade

clean: ## Remove the environment, local state and caches
	rm -rf $(VENV) .heliostat .bench .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
