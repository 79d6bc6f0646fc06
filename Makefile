# make demo     train, calibrate, prune and check a small network; writes demo/
# make test     the test suite
# make lint     formatting, style and types
# make format   write the formatting that `make lint` asks for
# make bench    the benchmarks
# make sanitize the GPU tests under compute-sanitizer, on a machine with a GPU
# make clean    remove what was built here, the environment included
#
# PYTHON=  the interpreter (3.10 or later) that makes the environment .venv
# TORCH=   the torch to install, as pip takes it: make demo TORCH=torch

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A stamp says that a step of the set-up is done, so that the next call goes straight to work.
DONE := $(VENV)/confprune
CSRC := $(shell find csrc -type f)
CXX_FILES := $(filter %.cpp %.h %.cu %.cuh,$(CSRC)) $(wildcard benchmarks/*.cpp)

# Reports why a step failed, after what the step itself printed, and stops.
stop = { printf '\nconfprune: %s\n' "$(1)" >&2; exit 1; }

.PHONY: demo test lint format bench sanitize clean FORCE
.DELETE_ON_ERROR:

demo: $(DONE)/build
	@$(BIN)/python -m confprune demo --out demo

test: $(DONE)/test
	@$(BIN)/python -m pytest --cov --cov-report=term

lint: $(DONE)/lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(if $(CXX_FILES),$(BIN)/clang-format --dry-run --Werror $(CXX_FILES))

format: $(DONE)/lint
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .
	@$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

bench: $(DONE)/bench
	@$(BIN)/python -m benchmarks

# Memory out of bounds, races in shared memory, and barriers that not all threads reach.
sanitize: $(DONE)/test
	@command -v compute-sanitizer >/dev/null \
	    || $(call stop,compute-sanitizer was not found: it comes with the CUDA toolkit)
	@for tool in memcheck racecheck synccheck; do \
	    echo "compute-sanitizer --tool $$tool"; \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	        $(BIN)/python -m pytest -q -x -m cuda tests/test_cuda_ops.py -k 'not memory and not wait' \
	        || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist demo htmlcov confprune.egg-info confprune/_C*.so .coverage*
	rm -rf .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find confprune tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# The set-up, one stamp a step.

$(DONE)/venv:
	@command -v '$(PYTHON)' >/dev/null \
	    || $(call stop,$(PYTHON) was not found: install Python 3.10 or later; or name one with PYTHON=)
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || $(call stop,Python 3.10 or later is needed; this is $$('$(PYTHON)' --version 2>&1). Name another with PYTHON=)
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null \
	    || $(call stop,this Python cannot make a virtual environment: apt install python3-venv)
	@echo 'int main() { if constexpr (true) return 0; }' \
	    | $${CXX:-c++} -std=c++17 -x c++ -fsyntax-only - \
	    || $(call stop,a C++17 compiler is needed: apt install g++; or name one in the variable CXX)
	@echo 'confprune: making the environment $(VENV)'
	@'$(PYTHON)' -m venv $(VENV) \
	    || $(call stop,the environment $(VENV) could not be made; the reason is above)
	@$(PIP) install --quiet 'pip>=23' 'setuptools>=77' wheel ninja \
	    || $(call stop,the build tools could not be installed; the reason is above)
	@mkdir -p $(DONE) && touch $@

$(DONE)/torch: $(DONE)/venv
	@echo 'confprune: installing $(TORCH)'
	@$(PIP) install '$(TORCH)' \
	    || $(call stop,$(TORCH) could not be installed; the reason is above. TORCH= names another)
	@echo '$(TORCH)' > $@

# Another torch is installed when it is asked for; a call that names none keeps what is there.
ifneq ($(origin TORCH),file)
ifneq ($(TORCH),$(shell cat $(DONE)/torch 2>/dev/null))
$(DONE)/torch: FORCE
endif
endif

$(DONE)/build: $(DONE)/torch setup.py pyproject.toml $(CSRC)
	@echo 'confprune: building the extension (a minute or two)'
	@$(PIP) install --quiet --no-build-isolation --editable '.[demo]' \
	    || $(call stop,confprune could not be built and installed; the reason is above)
	@touch $@

$(DONE)/test $(DONE)/lint $(DONE)/bench: $(DONE)/build
	@echo 'confprune: installing what $(@F) needs'
	@$(PIP) install --quiet 'confprune[$(@F)]' \
	    || $(call stop,what make $(@F) needs could not be installed; the reason is above)
	@touch $@
