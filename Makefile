# make demo, make test: each creates .venv, installs the dependencies, builds the extension and runs.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
OLDEST := .venv-oldest
TORCH_OLDEST ?= torch
DEMO_ARGS ?=
BENCH_ARGS ?= all
PYTHON_ENV ?= .venv
ARCHS ?=
GPU_ARGS ?=

.PHONY: demo test test-python test-cpp test-oldest coverage ptxas lint format build bench docs gpu-check wheel stubs clean

demo: build
	$(BIN)/fastsft demo $(DEMO_ARGS)

test: build test-python test-cpp

# A process per core; each starts with a part of the suite of its own, so that what a session shares is made once.
test-python: build
	$(BIN)/pytest --numprocesses $$(nproc) --maxprocesses 8 --dist worksteal

# The lines of the package that the tests run; it fails below the floor in pyproject.toml.
coverage: build
	$(BIN)/pytest --numprocesses $$(nproc) --maxprocesses 8 --dist worksteal -m "not slow" --cov --cov-report=term

# The lower bounds of the dependencies, with no extra installed; Python 3.10 to 3.12. The build of torch without CUDA:
# TORCH_OLDEST="torch --index-url https://download.pytorch.org/whl/cpu".
test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/pip install --quiet --no-build-isolation --no-deps -C build-dir=build/oldest \
	  -C cmake.define.FASTSFT_CUDA=OFF .
	$(OLDEST)/bin/pytest --numprocesses $$(nproc) --maxprocesses 8 --dist worksteal -m "not slow" \
	  tests/ops tests/models tests/cli tests/train

$(OLDEST)/ready:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --upgrade pip
	$(OLDEST)/bin/pip install --quiet "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.26" ninja \
	  "pytest>=8" "pytest-timeout>=2" "pytest-xdist>=3.6" "hypothesis>=6"
	$(OLDEST)/bin/python .ci/oldest.py > $(OLDEST)/oldest.txt
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/oldest.txt $(TORCH_OLDEST)
	$(OLDEST)/bin/pip install --quiet --requirement $(OLDEST)/oldest.txt
	touch $@

# Twice: AddressSanitizer with UndefinedBehaviorSanitizer on every instruction set's kernels, and ThreadSanitizer on the
# portable ones: all of them share the code that divides work among threads.
test-cpp: test-cpp-address test-cpp-thread
test-cpp-thread: PORTABLE := ON
test-cpp-address: PORTABLE := OFF

test-cpp-%: $(VENV)/ready
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/$* -G Ninja -DFASTSFT_PYTHON=OFF -DFASTSFT_TESTS=ON \
	  -DFASTSFT_SANITIZE=$* -DFASTSFT_PORTABLE=$(PORTABLE) -DFASTSFT_CUDA=OFF \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo > /dev/null
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/$*
	PATH="$(abspath $(BIN)):$$PATH" ctest --test-dir build/$* --output-on-failure --parallel $$(nproc)

# Registers and local memory of every CUDA kernel, where nvcc is at hand; ARCHS="100 120": for the release's others.
ptxas: $(VENV)/ready
	$(BIN)/python tests/cuda_host/ptxas.py $(ARCHS)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp' \
	  | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/python -m pybind11_stubgen fastsft._C -o build/stubs --exit-code > /dev/null
	diff -u python/fastsft/_C.pyi build/stubs/fastsft/_C.pyi
	$(BIN)/python bench/record.py --check

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp' | xargs $(BIN)/clang-format -i

stubs: build
	$(BIN)/python -m pybind11_stubgen fastsft._C -o build/stubs --exit-code > /dev/null
	cp build/stubs/fastsft/_C.pyi python/fastsft/_C.pyi

bench: build
	$(BIN)/fastsft bench $(BENCH_ARGS)

# The site of docs/, in build/docs: the parts that are made from the code anew, then every broken link an error.
docs: $(VENV)/ready
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev,docs]"
	$(BIN)/python docs/write_ops_reference.py
	$(BIN)/python docs/draw_architecture.py
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs build/docs

# For the GPU present: build, the GPU tests, the benches; GPU_ARGS="--quick" or "--only attention" cuts the last short.
# PYTHON_ENV=system: with the packages that PYTHON has; nothing is downloaded, no virtual environment is made.
ifeq ($(PYTHON_ENV),system)
GPU_PYTHON := $(PYTHON)
GPU_INSTALL := --no-deps .
else
GPU_PYTHON := $(BIN)/python
GPU_INSTALL := --editable ".[dev]"
gpu-check: $(VENV)/ready
endif

gpu-check:
	@arch=$$($(GPU_PYTHON) bench/gpu_present.py) && set -x && $(GPU_PYTHON) -m pip install --quiet --no-build-isolation \
	  -C cmake.define.FASTSFT_CUDA=ON -C cmake.define.CMAKE_CUDA_ARCHITECTURES=$$arch $(GPU_INSTALL)
	$(GPU_PYTHON) -m pytest -m gpu tests/ops tests/engine; tests=$$?; \
	  $(GPU_PYTHON) bench/gpu_check.py $(GPU_ARGS) && exit $$tests

wheel: $(VENV)/ready
	$(BIN)/pip wheel --no-deps --wheel-dir dist .

# Rebuilds only what changed; Python sources are used in place.
build: $(VENV)/ready
	@$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"

# torch first and pinned: on some systems any other request brings the CUDA build.
$(VENV)/ready:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.26" ninja
	touch $@

clean:
	rm -rf build dist $(VENV) $(OLDEST)
