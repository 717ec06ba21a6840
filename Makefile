# Two commands: `make quickstart` and `make test`. Each makes .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test lint clean

quickstart: .venv/installed
	@$(BIN)/python -m qlora_ray.train

test: .venv/installed
	$(BIN)/python -m pytest

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
