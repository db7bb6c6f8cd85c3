# Every command a contributor needs. `make help` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist worksteal
OUT ?= out
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1
export TOKENIZERS_PARALLELISM = false
DEMO := $(OUT)/demo
DEMO_PASSES := iter_smooth,quarot,autoround{iters=10}

.DEFAULT_GOAL := help
.PHONY: help venv demo test check slow lint types format docs bench clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z.]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP)  ## create .venv and install qc and its tools at the pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qc needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## compile a real model (SmolLM2-135M) to W4A4/W8A8, measure it, let it speak
	@set -eu; \
	model=$$($(BIN)/python -m benchmarks.smollm2); \
	echo "== compiling $$model to $(DEMO)"; \
	$(BIN)/qc compile "$$model" --passes '$(DEMO_PASSES)' --scheme auto --samples 8 --length 256 --out $(DEMO) --force; \
	echo "== measuring"; \
	$(BIN)/qc eval $(DEMO) --reference "$$model" --text benchmarks/evaluation.txt --length 256; \
	echo "== the quantized model speaks"; \
	$(BIN)/qc generate $(DEMO) "What is the capital of France?"; \
	echo "== done: the checkpoint and its report are in $(DEMO); the plan, every rewrite and its proof beside the weights"

test: lint types  ## what .ci/run runs: lint, types, and every test that does not take minutes
	$(PYTEST) -m "not slow"

check: lint types  ## the fast tier: without the real model, many architectures and whole commands (about 3 minutes on 2 cores)
	$(PYTEST) -m "not slow and not real and not broad"

slow: $(STAMP)  ## the checks that take minutes each
	$(BIN)/pytest -m slow

lint: $(STAMP)  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)  ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## the documentation as a site in out/site; a dead link or a page without a place is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --site-dir $(abspath $(OUT)/site)

bench: $(STAMP)  ## the measurements of docs/benchmarks.md and docs/architectures.md (about two hours on 2 cores)
	$(BIN)/python -m benchmarks.plan_cost
	$(BIN)/python -m benchmarks.depth_memory
	$(BIN)/python -m benchmarks.mutants
	$(BIN)/python -m benchmarks.reach
	$(BIN)/python -m benchmarks.cost
	$(BIN)/python -m benchmarks.runtime
	$(BIN)/python -m benchmarks.choosing
	$(BIN)/python -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.calibration

clean:  ## remove what was built (the environment stays)
	rm -rf build dist qc.egg-info .pytest_cache .ruff_cache $(OUT)
