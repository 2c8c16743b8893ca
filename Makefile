# make test                 everything on a fresh machine: virtual environment, torch, nvcc if there is none, build, tests
# make test ENV=current     the same with the Python on PATH and what is installed there; downloads nothing
# make test-install         README's install line in an empty environment, and the tests there; needs the network
# make demo                 watch a small GPT learn: on the kernels where there is a Hopper GPU, else in plain PyTorch
# make shim                 a wheel by the name of FlashAttention-3's, for one's own environments: docs/adapters.md
# make build|wheel|lint|format|clean, with either ENV
#
# PYTEST="-m gpu -x"        arguments for pytest
# DEMO="--attention sdpa"   arguments for examples/train_gpt.py

ENV ?= venv
PYTHON3 ?= python3
PYTEST ?=
DEMO ?=
CTEST := build/cmake

ifeq ($(ENV),venv)
PYTHON := .venv/bin/python
READY := .venv/ready
export PATH := $(CURDIR)/.venv/bin:$(PATH)
else ifeq ($(ENV),current)
PYTHON := $(PYTHON3)
READY :=
else
$(error ENV is '$(ENV)'; it must be venv or current)
endif

.PHONY: test test-install demo build host-tests wheel shim lint format clean
.NOTPARALLEL:

test: build host-tests
	$(PYTHON) -m pytest tests -q $(PYTEST)

test-install: $(READY)
	$(PYTHON) -m pytest tests -q -m network $(PYTEST)

# Nothing is compiled where it could not run; the command line finds its table of head dims there all the same. Threads
# that wait for each other give the core away: where anything else runs on a machine of few cores, the demo is several
# times faster so.
demo: $(READY)
	@capability=$$($(PYTHON) -c 'import torch as t; print(t.cuda.is_available() and t.cuda.get_device_capability())'); \
	if [ "$$capability" = "(9, 0)" ]; then $(MAKE) --no-print-directory build; \
	else echo "No Hopper GPU here: the kernels are not built."; $(PYTHON) tools/limits_table.py; fi
	@PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" OMP_WAIT_POLICY=passive \
	  $(PYTHON) examples/train_gpt.py $(DEMO)

build: $(READY)
	$(PYTHON) -W ignore setup.py -q build_ext --inplace

# C++ tests without torch; those of device code run where there is a Hopper GPU.
host-tests: $(READY)
	@if command -v cmake >/dev/null && command -v c++ >/dev/null; then \
	  mkdir -p $(CTEST); \
	  cuda=$$($(PYTHON) tools/toolkit.py 2>/dev/null); \
	  export LIBRARY_PATH="$$cuda/lib64:$$cuda/lib:$$LIBRARY_PATH"; \
	  cmake -S . -B $(CTEST) -DPython3_EXECUTABLE="$$(command -v $(PYTHON))" \
	    $${cuda:+-DCMAKE_CUDA_COMPILER="$$cuda/bin/nvcc"} >$(CTEST)/configure.log 2>&1 \
	    || { cat $(CTEST)/configure.log; exit 1; }; \
	  cmake --build $(CTEST) --parallel && ctest --test-dir $(CTEST) --output-on-failure; \
	else \
	  echo "No cmake or no C++ compiler here: the C++ tests are left out."; \
	fi

wheel: $(READY)
	$(PYTHON) -W ignore setup.py -q bdist_wheel
	@ls -l dist/*.whl

# From a copy: a build leaves files beside its sources.
shim: $(READY)
	@rm -rf build/shim && mkdir -p build && cp -r tools/shim build
	$(PYTHON) -m pip wheel -q --no-deps --no-build-isolation --wheel-dir dist ./build/shim
	@ls -l dist/flash_attn_3-*.whl

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	clang-format --dry-run --Werror $$(find csrc tests benchmarks -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

format: $(READY)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	clang-format -i $$(find csrc tests benchmarks -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

clean:
	rm -rf build dist *.egg-info flash_attn_ext/*.so flash_attn_ext/_build_info.py flash_attn_ext/_limits_table.py

# torch's own CUDA packages have no nvcc; tools/toolkit.py looks for one on the machine before one is installed here.
.venv/ready: pyproject.toml Makefile
	$(PYTHON3) -m venv .venv
	.venv/bin/python -m pip install -q --upgrade pip
	.venv/bin/python -m pip install -q 'torch==2.11.*' 'setuptools>=77' ninja cmake numpy pytest hypothesis \
	  rich matplotlib 'transformers==5.24.*' accelerate 'kernels==0.17.*' ruff==0.17.* clang-format==23.*
	@cuda=$$(.venv/bin/python -c 'import torch; print(torch.version.cuda or "")'); \
	if [ -n "$$cuda" ] && ! .venv/bin/python tools/toolkit.py >/dev/null 2>&1; then \
	  echo "No CUDA toolkit $$cuda found: installing nvcc from PyPI"; \
	  .venv/bin/python -m pip install -q "cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]==$$cuda.*"; \
	fi
	touch $@
