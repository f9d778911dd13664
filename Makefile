# make demo: the ablation on the shipped model, from a bare machine. make test: the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test check format wheel clean

install: $(STAMP)

# Installed anew whenever the dependencies change.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/tokenprune eval -m experiment=ablation
	$(BIN)/tokenprune report outputs/ablation
	@echo "Table:  outputs/ablation/results.csv"
	@echo "Page:   outputs/ablation/report.html"

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(STAMP)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) outputs multirun dist build .pytest_cache .mypy_cache .ruff_cache
