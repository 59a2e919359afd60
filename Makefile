# Set-up, notebook, tests. Needs Python >= 3.11 with pip, and make. `make help` lists what there is.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.llmkit-ready
ARGS   ?=
N      ?= 10
MINUTES ?= 20
ENGINE ?= fake

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_ROOT_USER_ACTION = ignore

# Jupyter refuses to run as root unless it is told that this is meant.
ALLOW_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: help setup lab demo newcomer test test-fast test-ray bench soak long-run lint clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## virtual environment in .venv with llmkit, its tools and vLLM; at once if it is there

lab: $(READY)  ## JupyterLab on port 8105 with the quickstart notebook
	$(BIN)/jupyter lab --port=8105 --LabApp.default_url=/lab/tree/notebooks/quickstart.ipynb $(ALLOW_ROOT) $(ARGS)

demo: $(READY)  ## the quickstart's work without a browser: question, answer, seconds of each step
	@$(BIN)/python -m llmkit.demo $(ARGS)

newcomer: $(READY)  ## the first minutes of somebody new: clone, `make lab`, first answer, seconds of each step
	@$(BIN)/python tests/newcomer.py

test: $(READY)  ## every test, in tiers; installs Chromium and JupyterHub's proxy where that is allowed
	@$(BIN)/python tests/tiers.py $(ARGS)

test-fast: $(READY)  ## the tests that need neither vLLM nor Ray nor a browser
	$(BIN)/python -m pytest -m "not vllm and not ray and not browser" $(ARGS)

test-ray: $(READY)  ## installs Ray and runs all tests of models on a cluster
	@$(BIN)/python -m pip install -qq --editable '.[ray]'
	$(BIN)/python -m pytest -m ray $(ARGS)

bench: $(READY)  ## the benchmarks, in about 20 minutes: table and plot in tests/benchmarks/results
	$(BIN)/python tests/benchmarks/run.py $(ARGS)

soak: $(READY)  ## the tests of reliability, N times as long (10 if not said), with their figures
	LLMKIT_SOAK=$(N) $(BIN)/python -m pytest -s --timeout=0 tests/reliability tests/engines/vllm/test_standby.py \
	  tests/jupyter_server_ext/test_hub_class.py $(ARGS)

long-run: $(READY)  ## mixed work for MINUTES (20) on ENGINE (fake or vllm); figures and plot in tests/reliability/results
	$(BIN)/python tests/reliability/long_run.py --minutes=$(MINUTES) --engine=$(ENGINE) $(ARGS)

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:  ## remove the virtual environment, caches and builds
	rm -rf $(VENV) .venv-bench build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A file in the environment says that it is complete: a second `make` is instant, an interrupted one goes on.
$(READY): pyproject.toml llmkit/engines/vllm/install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "llmkit needs Python 3.11 or newer; choose one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@rm -f $@
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo "Making a virtual environment in $(VENV)"; \
	  rm -rf $(VENV); \
	  $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
	    : 'Debian keeps what venv needs for pip in a package of its own; the pip that is there can do it too.'; \
	    rm -rf $(VENV); \
	    $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -qq pip; \
	  } || exit 1; \
	fi
	@echo "Installing llmkit and its tools"
	@$(BIN)/python -m pip install -qq --editable '.[dev]'
	@$(BIN)/python -m llmkit.engines.vllm.install
	@touch $@
