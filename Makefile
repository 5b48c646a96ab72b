# make quickstart   installs into .venv and runs the demonstration
# make test         installs into .venv, lints, checks types, runs the tests that are not slow
PYTHON ?= python3
VENV ?= .venv
VENV_MIN ?= .venv-min
PYTEST_ARGS ?=
# Every test runs on one thread; two of them run at a time, a file's tests in one process
PARALLEL ?= -n 2 --dist loadfile

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STAMP_MIN := $(VENV_MIN)/.installed

# A stamp holds the folder it was made in: an environment copied along with its clone would import the old clone.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif
ifneq ($(shell cat $(STAMP_MIN) 2>/dev/null),$(CURDIR))
$(STAMP_MIN): FORCE
endif

# $(call install,ENVIRONMENT,CONSTRAINTS,EXTRAS). An environment without pip is given one and keeps what is installed;
# one whose interpreter is gone is made anew.
# The constraint torch==2.13.0 is what keeps the CUDA packages of a plain `pip install torch` away from test machines.
define install
	@rm -f $(1)/.installed
	@$(1)/bin/python -m pip --version >/dev/null 2>&1 \
		|| if $(1)/bin/python -c "" 2>/dev/null; then $(PYTHON) -m venv $(1); else $(PYTHON) -m venv --clear $(1); fi
	$(1)/bin/python -m pip install --disable-pip-version-check -c $(2) -e ".[$(3)]"
	@printf '%s\n' "$(CURDIR)" > $(1)/.installed
endef

.PHONY: help install quickstart lint test test_slow test_min clean FORCE
.DEFAULT_GOAL := help

help:
	@echo "make install     create or update $(VENV)"
	@echo "make quickstart  install, then run hf-robust quickstart (writes runs/quickstart/)"
	@echo "make test        install, lint, then every test that is not slow"
	@echo "make test_slow   install, then the slow tests"
	@echo "make test_min    the invariance tests on the oldest supported dependencies ($(VENV_MIN))"
	@echo "make lint        install, then ruff and mypy"
	@echo "make clean       remove build outputs and caches (not the environments)"

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt,dev$(comma)plot)

$(STAMP_MIN): setup.cfg pyproject.toml constraints-min.txt
	$(call install,$(VENV_MIN),constraints-min.txt,dev$(comma)plot)

comma := ,

quickstart: install
	$(BIN)/hf-robust quickstart

lint: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

test: lint
	$(BIN)/python -m pytest -q -m "not slow" $(PARALLEL) --durations=10 $(PYTEST_ARGS)
	@echo "make test: lint, types and tests passed"

test_slow: install
	$(BIN)/python -m pytest -q -m slow --durations=10 $(PYTEST_ARGS)

test_min: $(STAMP_MIN)
	$(VENV_MIN)/bin/python -m pytest -q -m "invariance and not slow" $(PARALLEL) $(PYTEST_ARGS)
	@echo "make test_min: the invariance tests passed on the oldest supported dependencies"

clean:
	rm -rf build dist hf_robust.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find hf_robust trainers tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
