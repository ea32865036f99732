# Every target works on a fresh machine: the environment is made first, from pinned versions.
PYTHON ?= python3
DEMO_SECONDS ?= 180
BIN = .venv/bin

.PHONY: install demo test lint bench

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

demo: install
	$(BIN)/nanokimi demo --seconds $(DEMO_SECONDS)

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not serial"
	$(BIN)/python -m pytest -m serial

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: install
	$(BIN)/python -m benchmarks.bench --preset nano-243m
	$(BIN)/python -m benchmarks.bench --preset tiny
