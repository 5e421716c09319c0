# Two commands on a fresh machine with python3, git and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-all test lint docs docs-build clean

demo: .venv/users
	$(BIN)/python scripts/demo.py

demo-all: .venv/users
	$(BIN)/python scripts/demo.py --all

test: .venv/developers
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: .venv/developers
	$(BIN)/ruff check .

docs: .venv/docs
	$(BIN)/mkdocs serve

docs-build: .venv/docs
	$(BIN)/mkdocs build --strict

.venv/pip: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

# torch first and by itself, so that the version of constraints.txt decides and nothing else picks another build
.venv/users: .venv/pip requirements.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -r requirements.txt
	touch $@

.venv/developers: .venv/users requirements-dev.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -r requirements-dev.txt
	touch $@

.venv/docs: .venv/pip requirements-docs.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -r requirements-docs.txt
	touch $@

clean:
	rm -rf .venv site out checkpoints dataset/cache dataset/sample
