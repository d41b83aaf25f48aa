# Everything runs in .venv, made with PYTHON (>= 3.11) on first use; nothing else is needed but make and pip.
# Where uv is installed it does the installing, which is faster, and chooses the PyTorch for this machine's GPU or none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV := $(shell command -v uv 2>/dev/null)
EXTRAS := .[minilm,dev]
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '$(EXTRAS)'
UV_INSTALL := $(UV) pip install --quiet --python $(BIN)/python --torch-backend=auto --editable '$(EXTRAS)'
# A process a core, one thread each: most tests are many small steps. Compiled modules are kept, also where the
# environment says otherwise, as tests start hundreds of processes.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PARALLEL := --numprocesses auto --dist worksteal
KILLS := 1000
SEED := $(shell date +%s)
TMPDIR ?= /tmp
LINT := $(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports --no-cache

.PHONY: demo tokenizer test tests gpu-test gpu-bench nightly torture coverage update-snapshots lint format corpus-test docs site clean

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %d.%d: make PYTHON=python3.12" % sys.version_info[:2]) if sys.version_info < (3, 11) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), quietly and for some minutes: about 2 GB, 2.5 GB more with PyTorch for GPUs (README: Install)."
	$(if $(UV),$(UV_INSTALL) || { echo "uv could not install it; trying pip."; $(PIP_INSTALL); },$(PIP_INSTALL))
	touch $@

demo: $(STAMP)  ## Real text through all five commands, then a purge
	$(BIN)/python examples/demo.py demo

tokenizer: $(STAMP)  ## Train the tokenizer of the package again, from Debian packages: the same bytes
	$(BIN)/python tools/make_tokenizer.py

# Linting runs beside the tests, and what it prints comes after them.
test: $(STAMP)  ## Lint, types, import rules and every test
	@($(LINT)) > $(VENV)/lint.log 2>&1 & lint=$$!; \
	$(PYTEST) $(PARALLEL); tests=$$?; \
	wait $$lint; linted=$$?; cat $(VENV)/lint.log; \
	test $$tests -eq 0 || echo "make test: the tests failed"; \
	test $$linted -eq 0 || echo "make test: lint failed"; \
	test $$tests -eq 0 && test $$linted -eq 0

tests: $(STAMP)  ## The tests alone; ARGS=... goes to pytest
	$(PYTEST) $(PARALLEL) $(ARGS)

gpu-test: $(STAMP)  ## The tests that need a GPU; `make test` skips them
	CUDA_VISIBLE_DEVICES=$(or $(GPU),0) $(BIN)/python -m pytest tests/encoder tests/ann tests/stages/test_embed.py -k on_a_gpu

gpu-bench:  ## Ten minutes of measurements on a GPU, by the environment or else PYTHON=...; figures in gpu-bench/
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py --out gpu-bench

lint: $(STAMP)  ## Lint, types and import rules
	@$(LINT)

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# On the disk, where fsync counts, as is what follows it; then with all stores in memory, as on an object store.
# Two examples need RETROTOOL_CAUSAL_MODEL=directory for real text.
nightly: $(STAMP)  ## Every test, also the long ones, 300 examples a property, on both storages
	PYTEST_DEBUG_TEMPROOT=$(TMPDIR) HYPOTHESIS_PROFILE=nightly $(PYTEST) $(PARALLEL) --timeout 3600
	RETROTOOL_TEST_STORAGE=memory $(PYTEST) $(PARALLEL)
	for benchmark in benchmarks/*.py; do $(BIN)/python $$benchmark --help > $(VENV)/benchmark.log || exit 1; done

torture: $(STAMP)  ## KILLS=n kills, races, damages of each kind, 1,000 unless said, hours; SEED=n repeats a run; `make test` runs 1 to 3
	@echo "make torture KILLS=$(KILLS) SEED=$(SEED)"
	PYTEST_DEBUG_TEMPROOT=$(TMPDIR) HYPOTHESIS_PROFILE=nightly RETROTOOL_SEED=$(SEED) \
		RETROTOOL_KILLS=$(KILLS) RETROTOOL_CORPUS_KILLS=$(KILLS) RETROTOOL_DAMAGES=$(KILLS) \
		$(PYTEST) $(PARALLEL) tests/crash tests/corpus tests/corrupt tests/chunk/test_full_disk.py --timeout 0

corpus-test: $(STAMP)  ## Every document of CORPUS=folder of .jsonl.zst files, and 100 kills; `make test` takes Python's own texts
	RETROTOOL_CORPUS=$(abspath $(CORPUS)) RETROTOOL_CORPUS_KILLS=100 $(BIN)/python -m pytest tests/corpus --timeout 0

update-snapshots: $(STAMP)  ## Write what is printed now into pages and expected texts; ARGS=... names tests
	RETROTOOL_UPDATE_SNAPSHOTS=1 $(PYTEST) $(PARALLEL) $(or $(ARGS),tests/cli tests/docs tests/pinned)

coverage: $(STAMP)  ## Lines that no test reaches; subprocesses are not counted
	COVERAGE_FILE=$(VENV)/coverage.data $(PYTEST) $(PARALLEL) --cov=retrotool --cov-report=term:skip-covered --cov-report=html:$(VENV)/coverage

docs: $(STAMP)  ## Write docs/cli.md from --help
	$(BIN)/python docs/make_cli.py

site: $(STAMP)  ## The documentation as a site in build/site, which opens from the disk
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache
