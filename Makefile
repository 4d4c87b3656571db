# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
#
#   make demo    install into .venv, compile a bundled trained model, print float against int8
#   make test    install into .venv and run the tests against the installed package, JOBS at once
#
# Both do all their set-up. They need Python 3.10 to 3.13 with venv, and a C compiler (for linking).
# Useful variables: PYTHON=python3.12  VENV=/some/where  PYTEST_ARGS="-k report"  JOBS=1

VENV ?= .venv
PYTEST_ARGS ?=
DEMO_OUT ?= demo
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
SHELL := /bin/bash

BIN := $(abspath $(VENV))/bin
STAMPS := $(abspath $(VENV))/.stamps
MODEL := models/digits_cnn
SOURCES := $(shell find qcompiler passes targets -name '*.py' 2>/dev/null) pyproject.toml LICENSE README.md

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow install lint format types check clean distclean

help:
	@sed -n 's/^#   //p' Makefile
	@echo 'make lint    ruff check and ruff format --check; make format repairs both'
	@echo 'make types   mypy --strict over qcompiler, qcompiler.passes and qcompiler.targets'
	@echo 'make check   lint, types and test; make test-slow runs the long tests'
	@echo 'make clean   remove build outputs; make distclean removes the environment too'

# --- environment ---------------------------------------------------------------------------------

# The whole search is one script, so that a pyenv shim that exists but does not run is passed over.
$(STAMPS)/venv:
	@./tools/make_venv.sh "$(VENV)" "$(PYTHON)"
	@mkdir -p $(STAMPS) && touch $@

# Not editable on purpose: what runs is what a user gets from the wheel. `build/lib` is removed first
# because setuptools would pack modules that were deleted since it was made.
$(STAMPS)/install: $(STAMPS)/venv $(SOURCES)
	@echo "Installing qcompiler and what it needs (a minute or two the first time) ..."
	@rm -rf build/lib build/bdist.*
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check .
	@touch $@

$(STAMPS)/dev: $(STAMPS)/install
	@echo "Installing the test and lint tools ..."
	@rm -rf build/lib build/bdist.*
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check '.[dev]'
	@touch $@

install: $(STAMPS)/install

# --- the two commands ----------------------------------------------------------------------------

demo: $(STAMPS)/install
	@mkdir -p $(DEMO_OUT)
	$(BIN)/qcompile compile $(MODEL)/model.onnx \
	  --calibration $(MODEL)/calib.npz --evaluate $(MODEL)/eval.npz --metric top1 \
	  --max-drop 1.0 --report $(DEMO_OUT)/report.html -o $(DEMO_OUT)/digits_cnn.qcm
	@echo "Open $(DEMO_OUT)/report.html for the report with charts."

# `pytest` as a script and not `python -m pytest`: the latter puts this folder on sys.path, where the
# source folder qcompiler/ would hide the installed package (tests/conftest.py guards that as well).
# Tests that decide by times they measure run afterwards, alone. pytest exits with 5 if none is asked for.
test: $(STAMPS)/dev
	$(BIN)/pytest -n $(JOBS) -m 'not slow and not timed' $(PYTEST_ARGS)
	$(BIN)/pytest -m 'timed and not slow' $(PYTEST_ARGS) || [ $$? = 5 ]

test-slow: $(STAMPS)/dev
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

# --- quality -------------------------------------------------------------------------------------

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMPS)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMPS)/dev
	./tools/types.sh $(BIN)/mypy

check: lint types test

clean:
	rm -rf build dist $(DEMO_OUT) .mypy_cache .ruff_cache .pytest_cache .hypothesis

distclean: clean
	rm -rf $(VENV) *.egg-info
