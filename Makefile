# What a reader types: each command makes .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install quickstart test test-slow lint clean

install: .venv/installed

quickstart: .venv/installed
	@$(BIN)/python -m qlora_ray.train

test: .venv/installed
	$(BIN)/python -m pytest

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# torch on its own and first: where a CPU build is at hand, this takes it, and nothing later replaces it.
.venv/installed: pyproject.toml constraints.txt
	@echo "Installing into .venv: a few minutes, once (log: .venv/install.log)"
	@$(PYTHON) -m venv .venv
	@($(PIP) torch && $(PIP) -e ".[dev]") > .venv/install.log 2>&1 || { tail -20 .venv/install.log; exit 1; }
	@touch $@

clean:
	rm -rf .venv
