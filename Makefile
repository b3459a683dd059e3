# make demo and make test set up what they need in .venv by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := CXX=$(CXX) $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WORKERS ?= 2 # processes that tests are spread over, of some 7 GB each
SPREAD = -n $(WORKERS) --dist worksteal
SLOWEST = --durations=20 --durations-min=2
ROWS = # of grids: those that pyproject.toml chooses
# The GPU kernels' tests have no conftest.py, which says this to all others and why.
WAITING = OMP_WAIT_POLICY=passive OPENBLAS_NUM_THREADS=1
PYTEST = TF_CPP_MIN_LOG_LEVEL=3 $(BIN)/python -m pytest $(SPREAD) $(SLOWEST) $(ROWS)

.DEFAULT_GOAL := help
.NOTPARALLEL: # pip installs into one .venv
.PHONY: help docs install demo test test-all test-triton test-gpu test-native lint format bench bench-gpu bench-door docs-figures docs-figures-fashion-mnist release-check clean compiler

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## Set up everything for development in .venv.

demo: $(VENV)/.demo ## Compare placements of batch normalization on embedded data.
	$(BIN)/evennorm compare

# Each engine needs a process of its own; all of them run, and any failure is the result. Half of the time is XLA's compiler:
# it optimizes where rounding is tested, and not where a program of JAX runs once.
NUMERICS := tests/contract tests/core
ONCE = XLA_FLAGS=--xla_backend_optimization_level=0
test: $(VENV)/.installed ## Run the tests on every engine.
	@failed=0; \
	run() { echo "== $$1"; shift; env "$$@" || failed=1; }; \
	run "formulas and kernels" KERAS_BACKEND=jax $(PYTEST) $(NUMERICS); \
	run "everything else, Keras on jax" KERAS_BACKEND=jax $(ONCE) $(PYTEST) $(NUMERICS:%=--ignore=%); \
	run "Keras on torch" KERAS_BACKEND=torch $(PYTEST) tests/keras tests/migration tests/upstream; \
	run "Keras on tensorflow" KERAS_BACKEND=tensorflow $(PYTEST) tests/keras tests/migration tests/upstream; \
	run "Keras on numpy" KERAS_BACKEND=numpy $(PYTEST) tests/keras; \
	run "the GPU kernels, in Triton's interpreter" $(MAKE) --no-print-directory test-triton; \
	exit $$failed

test-all: ## Run the tests with every row of their grids and more random examples, before a release.
	@$(MAKE) --no-print-directory test ROWS='-m "" --hypothesis-profile=thorough'

# Triton cannot be loaded after TensorFlow, and torch's compiler loads it wherever it finds it: it lies in a folder of its own.
TRITON := $(VENV)/triton
TRITON_VERSION := $(shell grep -o 'triton==[0-9.]*' constraints.txt)
GPU_TESTS := -m pytest --noconftest $(wildcard tests/contract/test_triton*.py)

test-triton: $(VENV)/.installed ## Run the tests of the GPU kernels without a GPU.
	@if [ -d $(TRITON) ]; then PYTHONPATH=$(TRITON) TRITON_INTERPRET=1 $(WAITING) $(BIN)/python $(GPU_TESTS) $(SPREAD) $(SLOWEST) $(filter-out --hypothesis-profile=%,$(ROWS)); \
	else echo "SKIPPED: the tests of the GPU kernels need Triton, which is not installed here: it is there for Linux on x86-64"; fi

# On the GPU's own machine, with the Python that has its torch: no .venv, nothing built. Needs torch, triton, numpy and pytest.
test-gpu: ## Run the tests of the GPU kernels on this machine's GPU, with PYTHON.
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || \
		{ echo "test-gpu runs on a CUDA device, and torch sees none here; run it on a machine that has one, or make test-triton"; exit 2; }
	PYTHONPATH=src EVENNORM_TEST_DEVICE=cuda $(PYTHON) $(GPU_TESTS) -m "" -p no:cacheprovider -W default -W "error:evennorm takes" $(ARGS)

# With cmake and ninja of the .venv. AddressSanitizer also looks for undefined behaviour; what is never given back is still reachable.
test-native: $(VENV)/.installed ## Run the kernels' own tests under sanitizers.
	@for sanitizer in address,undefined thread; do \
		build=build/native-$${sanitizer%%,*}; echo "== kernels under $$sanitizer"; \
		$(BIN)/cmake -S . -B $$build -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_CXX_COMPILER=$(CXX) \
			-DEVENNORM_NATIVE_TESTS=ON -DEVENNORM_SANITIZE=$$sanitizer -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1 >/dev/null && \
		$(BIN)/cmake --build $$build -- --quiet && \
		$$build/test_kernels $$(test $$sanitizer != thread || echo threads) || exit 1; \
	done

lint: $(VENV)/.installed ## Check style, types and import rules.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.installed ## Put the code in the house's style.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.installed ## Measure accuracy and speed; rewrites benchmarks/results and the pages made from them.
	@for script in $(filter-out benchmarks/gpu.py benchmarks/door.py,$(wildcard benchmarks/[a-z]*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

bench-gpu: ## Measure networks, calls and arrays on this machine's GPU, with PYTHON; rewrites benchmarks/results/gpu-*.json.
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py $(BENCH)

bench-door: $(VENV)/.installed ## Show where the microseconds of a call go.
	@$(BIN)/python benchmarks/door.py $(BENCH)
	@if [ -d $(TRITON) ]; then echo; echo "On the way to a GPU whose driver launches nothing:"; \
		PYTHONPATH=$(TRITON) $(BIN)/python -m evennorm.tools.bench.stub_gpu; fi

docs-figures: $(VENV)/.installed ## Run the demo; rewrites its table, time and picture in README.md and docs/compare.md.
	$(BIN)/python benchmarks/_docs_figures.py demo
	$(BIN)/python benchmarks/_designs.py

docs-figures-fashion-mnist: $(VENV)/.installed ## The same for docs/fashion-mnist.md; takes hours. FASHION=folder of the IDX files.
	$(BIN)/python benchmarks/_docs_figures.py fashion-mnist $(FASHION)

docs: $(VENV)/.installed ## Build the documentation as a site, in build/site.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "build/site is ready; to read it: $(BIN)/python -m http.server --directory build/site"

release-check: $(VENV)/.installed ## Build sdist and wheel in isolation, and try the wheel in clean ENVIRONMENTS.
	CXX=$(CXX) $(BIN)/python .ci/release_check.py $(ENVIRONMENTS)

clean: ## Remove .venv, builds and caches.
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Debian without python3-venv leaves half a .venv behind, which would pass for a whole one.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "evennorm needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1); choose one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

compiler:
	@command -v $(firstword $(CXX)) >/dev/null || \
		{ echo "evennorm's kernels need a C++20 compiler, and $(CXX) was not found; install g++ or clang, or choose one: make CXX=clang++"; exit 1; }

# One .venv serves both: what the demo needs, without torch and TensorFlow, and everything.
# Built without isolation: where torch is at hand, so is the extension that is linked to it.
NATIVE := CMakeLists.txt $(wildcard native/*)
BUILD := scikit-build-core nanobind cmake ninja

$(VENV)/.demo: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python compiler
	$(PIP) $(BUILD)
	$(PIP) --no-build-isolation --editable '.[demo]'
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python compiler
	$(PIP) torch
	$(PIP) $(BUILD)
	$(PIP) --no-build-isolation --editable '.[dev]'
	@rm -rf $(TRITON)
	-@test "$$(uname -sm)" != "Linux x86_64" || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(TRITON) $(TRITON_VERSION)
	@touch $@ $(VENV)/.demo
