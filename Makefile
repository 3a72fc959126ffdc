# Two commands for a newcomer: `make demo` and `make test`. Each makes .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready
# A worker a core; a file's tests stay together, and with them the kernels they share.
WORKERS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

.PHONY: demo test hostile lint bench gate clean

demo: $(READY)
	$(BIN)/fastopt demo

test: $(READY)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Of `make test`: beside torch.compile, process groups, and a cache that others can write.
hostile: $(READY)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m hostile -v tests/hostile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m bench.report --out bench/results
	$(BIN)/python -m bench.row_report --out bench/results
	$(BIN)/python -m bench.pass_report --out bench/results
	$(BIN)/python -m bench.function_report --out bench/results
	$(BIN)/python -m bench.output_report --out bench/results

gate: $(READY)
	$(BIN)/python -m tests.gpu.run_gate

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable ".[demo,test,bench,lint]"
	touch $(READY)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
