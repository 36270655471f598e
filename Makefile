# Everything a newcomer needs is `make quickstart` and `make test`; both install into .venv first, once.
# A machine needs Python 3.11 or later with pip and venv, and a package registry. Nothing else.

PYTHON ?= python3
RECIPE ?= recipes/real/alpaca_en.yaml

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

# One thread: two per process on a busy machine are up to a hundred times slower. No test reaches the network.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help quickstart quickstart-seeds quickstart-methods quickstart-rlhf bench-preference bench-rlhf bench-rollout real test test-long lint format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

quickstart: $(INSTALLED) ## pretrain, SFT, DPO and a comparison of a small model on a CPU, with an offline report
	@$(BIN)/align run recipes/quickstart/sft_dpo.yaml

quickstart-seeds: $(INSTALLED) ## the quickstart with three seeds and with shuffled labels as a control
	@$(BIN)/python -m bench.quickstart_seeds

quickstart-methods: $(INSTALLED) ## every preference method from one SFT policy, three seeds, gold reward with intervals
	@$(BIN)/python -m bench.quickstart_methods

quickstart-rlhf: $(INSTALLED) ## PPO, RLOO, GRPO, RFT, RRHF and iterative DPO against one reward model, three seeds and a control
	@$(BIN)/python -m bench.quickstart_rlhf

bench-preference: $(INSTALLED_DEV) ## preference training beside TRL, and each technique beside its absence, on a CPU
	@$(BIN)/python -m bench.preference

bench-rollout: $(INSTALLED) ## drawing completions beside transformers' generate and generate_batch, on a CPU
	@$(BIN)/python -m bench.rollout

bench-rlhf: $(INSTALLED_DEV) ## memory of PPO's four roles on one base, beside SFT and beside four bases, on a CPU
	@$(BIN)/python -m bench.rlhf_memory

real: $(INSTALLED) ## a recipe on a published model (RECIPE=recipes/real/...)
	@$(BIN)/align run $(RECIPE)

test: lint ## lint, types, import contracts and the test suite
	@$(TEST_ENV) $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

test-long: $(INSTALLED_DEV) ## the rest of the matrices whose corners `make test` runs
	@$(TEST_ENV) $(BIN)/python -m pytest -q -m long

lint: $(INSTALLED_DEV) ## ruff, mypy and the import contracts
	@$(BIN)/ruff check -q
	@$(BIN)/ruff format -q --check
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo > $(VENV)/contracts.log 2>&1 || { cat $(VENV)/contracts.log; exit 1; }

format: $(INSTALLED_DEV) ## mend what ruff can mend
	@$(BIN)/ruff check -q --fix
	@$(BIN)/ruff format -q

clean: ## remove the virtual environment, caches and builds; artifacts of runs stay
	@rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find align tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "align needs Python 3.11 or later; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing align into $(VENV) (once, a few minutes)"
	@$(PIP) -e .
	@touch $@

$(INSTALLED_DEV): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing align, its extras and the developer tools into $(VENV) (once, a few minutes)"
	@$(PIP) -e '.[all,dev]'
	@touch $(INSTALLED) $@
