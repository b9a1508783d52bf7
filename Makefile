# make demo: from nothing to completions on this host.  make test: every check that CI runs.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

BIN := $(VENV)/bin
# -qq: errors only
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint install clean

demo: install
	$(BIN)/python -m batchinfer

# A process more than there are cores, since some tests wait for SLURM; of one thread each: threads of several processes would
# fight for the cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$(($$(nproc) + 1)) --dist worksteal $(PYTEST_FLAGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(INSTALLED)

# torch goes first and by itself, so that its build (CPU, or which CUDA) is chosen here and not by the resolver. The kernels are
# compiled against its headers, hence no build isolation.
$(INSTALLED): pyproject.toml setup.py $(filter-out %.md,$(wildcard csrc/* csrc/common/*))
	@echo "installing into $(VENV); PyTorch is large, this takes minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)" "setuptools>=77"
	$(PIP) install --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info batchinfer/_kernels.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
