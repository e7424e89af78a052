# Thin targets. Each works as the first command after a clone, on Linux with Python 3.11+ and a C compiler.
# `make` alone prints them; ARGS="..." reaches the command behind a target.

PYTHON ?= python3
ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
# The stamps: libraries to run Sublet; the tools to test it; the software GPU.
RUNTIME := $(VENV)/.stamp-runtime
DEV := $(VENV)/.stamp-dev
SOFTGPU := $(VENV)/.stamp-softgpu
SOFTGPU_SOURCES := $(shell find softgpu \( -name '*.c' -o -name '*.h' -o -name '*.map' -o -name '*.py' \) 2>/dev/null)
ROOTS := $(wildcard sublet schemas kit devices softgpu engines services benchmarks tests tools)

.DEFAULT_GOAL := help
.PHONY: help setup demo up sim bench soak test check coverage compose-test fmt schemas golden snapshots docs clean
.SUFFIXES:

help:
	@echo "Sublet: many models on few GPUs. Targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# ---- run --------------------------------------------------------------------------------------------------------

setup: $(DEV) $(SOFTGPU) ## everything to develop: .venv with test tools, software GPU
	@echo "ready: make demo, make test, make check"

demo: $(RUNTIME) $(SOFTGPU) ## three models and a training job on two software GPUs; ends with a table
	@$(PY) -m services demo $(ARGS)

up: $(RUNTIME) $(SOFTGPU) ## the same, to use: prints addresses, a key and one next step
	@$(PY) -m services up $(ARGS)

sim: $(RUNTIME) ## a scenario in virtual time: make sim SCENARIO=tests/simulation/scenarios/NAME.txt
	@$(PY) -m services sim $(SCENARIO) $(ARGS)

bench: $(DEV) $(SOFTGPU) ## a stated figure, measured again: make bench ARGS="NAME --check"
	@$(PY) -m benchmarks $(ARGS)

soak: $(DEV) $(SOFTGPU) ## 2,000 parks and wakes with kills and failing driver calls: nothing may leak; about 20 minutes
	@$(PY) -m benchmarks soak --check $(ARGS)

# ---- test -------------------------------------------------------------------------------------------------------

test: $(DEV) $(SOFTGPU) ## all tests but those for physical GPUs
	@SUBLET_TESTS_REQUIRE=nats $(PY) -m pytest -q $(ARGS)

check: $(DEV) ## format, lint, types, import contracts, generated files
	@failed=""; step() { echo "$$1"; name=$$1; shift; "$$@" || failed="$$failed $$name"; }; \
	step format $(PY) -m ruff format --check --quiet .; \
	step lint $(PY) -m ruff check --quiet .; \
	step types $(PY) -m mypy --no-error-summary $(ROOTS); \
	step imports $(PY) tools/import_contracts.py; \
	step schemas $(PY) -m schemas --check; \
	step decisions $(PY) tools/adr_index.py --check; \
	step residency $(PY) tools/residency_page.py --check; \
	if [ -n "$$failed" ]; then echo "check: failed:$$failed" >&2; exit 1; fi; echo "check: passed"

coverage: $(DEV) ## how much of the software GPU's C code the tests execute
	@$(PY) tools/softgpu_coverage.py $(ARGS)

compose-test: $(DEV) ## the tests that need Docker
	@SUBLET_TESTS_REQUIRE=docker $(PY) -m pytest -q -m docker $(ARGS)

# ---- write ------------------------------------------------------------------------------------------------------

fmt: $(DEV) ## format the code and mend what ruff can
	@$(PY) -m ruff format --quiet . && $(PY) -m ruff check --quiet --fix .

schemas: $(RUNTIME) ## regenerate JSON Schema, AsyncAPI and their pages from the message types
	@$(PY) -m schemas $(ARGS)

golden: $(RUNTIME) ## write the first fixture of each new message
	@$(PY) -m schemas --golden $(ARGS)

snapshots: $(DEV) $(SOFTGPU) ## rewrite expected values inside tests; the review is `git diff`
	@$(PY) -m pytest -q --inline-snapshot=fix,create $(ARGS)

docs: $(DEV) ## regenerate every generated page
	@$(PY) -m schemas && $(PY) tools/adr_index.py && $(PY) tools/residency_page.py

clean: ## remove .venv and caches
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis dist build

# ---- stamps -----------------------------------------------------------------------------------------------------

$(RUNTIME): pyproject.toml tools/bootstrap.py
	@command -v $(PYTHON) >/dev/null || { echo "sublet: Python 3.11 or newer is needed, and there is no $(PYTHON) on PATH; install it (Debian, Ubuntu: apt-get install python3 python3-venv) and run make again" >&2; exit 1; }
	@$(PYTHON) tools/bootstrap.py runtime
	@touch $@

$(DEV): $(RUNTIME)
	@$(PYTHON) tools/bootstrap.py dev
	@touch $@

$(SOFTGPU): $(RUNTIME) $(SOFTGPU_SOURCES)
	@echo "building the software GPU"
	@$(PY) -c "import softgpu; softgpu.build()"
	@touch $@
