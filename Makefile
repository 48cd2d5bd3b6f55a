# Two commands set up everything: `make demo` and `make test`. Both make the environment in .venv/ first.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEMO_PROMPT := a glossy red ball on top of a large blue cube, and a yellow cone to the right of the cube

.PHONY: demo test lint types fast test-gpu clean

demo: .venv/core
	$(BIN)/gossamer run "$(DEMO_PROMPT)" --storage nf4 --lora pencil --seed 0 --output outputs/demo.png --overwrite
	@echo "The picture is $(CURDIR)/outputs/demo.png"

test: lint types fast

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test
	$(BIN)/mypy

fast: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n 2

test-gpu:
	$(PYTHON) -m pytest -m gpu

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Gossamer needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	touch $@

.venv/test: .venv/core
	$(INSTALL) --editable '.[test]'
	touch $@

clean:
	rm -rf .venv outputs
