# Thin on purpose: set up once, then call the project's own commands.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# e.g. --extra-index-url https://download.pytorch.org/whl/cpu, for a build without CUDA
TORCH_OPTIONS ?=
# most tests are of one thread
TEST_PROCESSES ?= 2
# optional dependencies to install, as pip writes them; the training image has none
EXTRAS ?= [dev]
CPP := $(foreach folder,bitdistill_core/engine/native tests/native,$(wildcard $(folder)/*.h $(folder)/*.cpp))
STAMP := $(VENV)/.installed$(subst [,-,$(subst ],,$(EXTRAS)))

.PHONY: help demo test setup lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   convert the demo model and print where the report is"
	@echo "make test   run the test suite"
	@echo "make setup  environment and native extension only"
	@echo "make lint   ruff, mypy and the length of C++ lines"
	@echo "make clean  remove the environment, the build and the demo's run"

demo: setup
	$(BIN)/bitdistill convert --profile demo

test: setup
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@awk 'length > 120 { print FILENAME ":" FNR ": longer than 120 characters"; found = 1 } END { exit found }' $(CPP)

setup: $(STAMP)

# torch comes first, through pip, so that a CPU build configured for pip is kept; uv then does the rest in seconds.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard bitdistill_core/engine/native/*)
	@command -v $(PYTHON) >/dev/null || { echo "missing: Python 3.11 ($(PYTHON)); install it or set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "wrong Python: 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "missing: the venv module of $(PYTHON) (Debian: apt install python3-venv)"; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "missing: a C++ compiler (Debian: apt install g++)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip uv
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH_OPTIONS) torch cmake ninja nanobind scikit-build-core
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt --no-build-isolation -e '.$(EXTRAS)'
	@touch $@

clean:
	rm -rf $(VENV) build runs/demo
