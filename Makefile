# make demo: the ablation on the shipped model, from a bare machine. make test: the tests.
# make test-all: and every model type, attention and mode. make test-oldest: the oldest transformers.
# make test-harness: the benchmarks of lmms-eval. make test-cluster: on a real Slurm (Debian, root).
# make test-loggers: Weights & Biases and MLflow.
# make paper: the experiments that repeat the paper's tables and figures.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := .venv-oldest
HARNESS := .venv-harness
LOGGERS := .venv-loggers

# As many processes as there are cores, one thread each; in random order, whose seed is printed.
PYTEST := -m pytest --numprocesses logical --maxprocesses 16 --dist worksteal

.PHONY: install demo paper test test-all test-matrix test-oldest test-harness test-cluster test-loggers check format wheel clean

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

# Started again, it goes on where it was stopped: experiments/paper/README.md says how long it takes.
PAPER := --config-dir experiments/paper
paper: $(STAMP)
	$(BIN)/tokenprune train $(PAPER) experiment=training launcher=joblib
	$(BIN)/tokenprune eval $(PAPER) experiment=inference launcher=joblib
	$(BIN)/tokenprune eval $(PAPER) experiment=one_cut launcher=joblib
	$(BIN)/tokenprune bench $(PAPER) experiment=steps
	$(BIN)/python experiments/paper/publish.py
	for name in ablation budgets layers variants difficulty; do \
	  $(BIN)/tokenprune eval experiment=$$name && $(BIN)/python experiments/$$name/publish.py || exit 1; \
	done

# Of some files only: make test TESTS=tests/engine
TESTS :=
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(TESTS)

test-all: test test-matrix

# Of it a share, each time another: make test-matrix DRAW=0.3 TESTS=tests/engine
DRAW := 1
test-matrix: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m matrix --draw $(DRAW) $(TESTS)

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) tests/engine/test_golden.py tests/engine/test_oracles.py tests/engine/test_engine.py tests/families/test_adapters.py

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --editable ".[dev]" --constraint constraints-oldest.txt
	touch $@

# The benchmarks of lmms-eval, in an environment of their own.
test-harness: $(HARNESS)/.installed
	OMP_NUM_THREADS=1 $(HARNESS)/bin/python $(PYTEST) tests/evaluation/test_benchmark.py

$(HARNESS)/.installed: pyproject.toml constraints.txt tests/harness.txt
	test -x $(HARNESS)/bin/python || $(PYTHON) -m venv $(HARNESS)
	$(HARNESS)/bin/python -m pip install --quiet --editable ".[dev]" -r tests/harness.txt --constraint constraints.txt
	$(HARNESS)/bin/python -m pip install --quiet --no-deps "lmms-eval==0.7.3"
	touch $@

# One after another: they share two nodes, both on this machine.
test-cluster: $(STAMP)
	command -v slurmctld >/dev/null || (apt-get update -qq && apt-get install -y -qq slurm-wlm munge)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster tests/cluster

# Weights & Biases and MLflow, in an environment of their own.
test-loggers: $(LOGGERS)/.installed
	OMP_NUM_THREADS=1 $(LOGGERS)/bin/python $(PYTEST) -m "matrix or not matrix" tests/cli/test_loggers.py

$(LOGGERS)/.installed: pyproject.toml constraints.txt
	test -x $(LOGGERS)/bin/python || $(PYTHON) -m venv $(LOGGERS)
	$(LOGGERS)/bin/python -m pip install --quiet --editable ".[dev,wandb,mlflow]" --constraint constraints.txt
	touch $@

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) $(OLDEST) $(HARNESS) $(LOGGERS) outputs multirun dist build .pytest_cache .mypy_cache .ruff_cache
