# KamaCache: every command of the project. `make help` lists them.
# Needs python 3.11 or newer, make, git and a C compiler; the rest goes into .venv.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PYVER := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
# The stamps carry the version, so that PYTHON=python3.12 remakes a 3.11 environment.
RUNTIME := $(VENV)/.runtime-$(PYVER)
DEV := $(VENV)/.dev-$(PYVER)
BENCH := $(VENV)/.bench-$(PYVER)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
ARGS ?=
# The virtual environment that the systemd unit runs, and a root to install below.
SERVICE_PREFIX ?= /opt/kamacache
DESTDIR ?=

.DEFAULT_GOAL := help
.PHONY: help venv run demo test check format bench bench-quick bench-check bench-baseline profile \
	soak soak-quick proto proto-check install-service clean
.DELETE_ON_ERROR:

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(RUNTIME): pyproject.toml
	@test -n "$(PYVER)" || { echo "python 3.11 or newer not found; try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is $(PYVER); KamaCache needs 3.11 or newer" >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -e '.[metrics]'
	@touch $@

$(DEV): $(RUNTIME)
	$(PIP) install -e '.[dev]'
	@touch $@

$(BENCH): $(RUNTIME)
	$(PIP) install -e '.[bench]'
	@touch $@

venv: $(DEV) ## make .venv with the runtime and the tools

run: $(RUNTIME) ## start a node of 8 workers with the demo app (Ctrl-C ends it)
	$(BIN)/python scripts/run_demo.py $(ARGS)

demo: $(RUNTIME) ## three nodes on 8001-8003, HTTP on 9999: who loads what; ends by itself
	@$(BIN)/python scripts/demo.py $(ARGS)

test: $(DEV) ## run the tests, several files at once (ARGS='-k name'; one at a time: ARGS='-n 0')
	@$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

check: $(DEV) ## ruff, mypy --strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV) ## let ruff format and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BENCH) ## the standard set in 10 minutes; writes docs/benchmarks.md (uses redis-server, memcached)
	$(BIN)/python scripts/bench/standard.py $(ARGS)

bench-quick: $(BENCH) ## the same, short: shows that all of it runs, not what it measures
	$(BIN)/python scripts/bench/standard.py --quick --results build/benchmarks-quick.json $(ARGS)

bench-check: $(BENCH) ## fail where a hot path takes more instructions than it did (needs valgrind)
	$(BIN)/python scripts/bench/instructions.py --check $(ARGS)

bench-baseline: $(BENCH) ## write down the instructions that the hot paths take now
	$(BIN)/python scripts/bench/instructions.py --update $(ARGS)

profile: $(BENCH) ## CPU profiles of the hot paths, by py-spy, into build/profiles
	$(BIN)/python scripts/bench/profiles.py $(ARGS)

soak: $(DEV) ## stress tests at full length, and the soak tests
	KAMACACHE_STRESS=full $(BIN)/python -m pytest -m 'stress or soak' --timeout=7200 $(ARGS)

soak-quick: $(DEV) ## stress tests at CI length
	$(BIN)/python -m pytest -m stress $(ARGS)

proto: $(DEV) ## make the gRPC stubs anew
	$(BIN)/python scripts/gen_proto.py

proto-check: $(DEV) ## fail when the stubs are not what proto/ makes
	$(BIN)/python scripts/gen_proto.py --check

install-service: ## systemd unit, its user, example settings (as root or with DESTDIR=; else only says what)
	@$(PYTHON) scripts/install_service.py --destdir="$(DESTDIR)" --prefix="$(SERVICE_PREFIX)" $(ARGS)

clean: ## remove .venv, caches and the demo's data
	rm -rf $(VENV) build dist .demo .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
