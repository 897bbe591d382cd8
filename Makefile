# Everything runs from .venv, which the first target that needs it makes. Nothing is needed before but Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two workers a core, as tests also wait for processes, disks and deadlines; each pins its maths to one thread so that
# ranks do not fight for cores.
JOBS ?= $(shell expr $$(nproc 2>/dev/null || echo 2) \* 2)
# What soaks has up to eight processes a test.
SOAK_JOBS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: install lint test soak faults bench demo clean
.DEFAULT_GOAL := test

install: $(STAMP)

# torch first and by its exact pin: any looser request, also one made through a dependency, may bring the CUDA build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A worker has all tests of a file. The folders with the longest files come first, as whoever begins such a one last keeps
# all others waiting. Bytecode is kept, as many tests start processes of their own.
LONGEST := tests/trainers tests/checkpoint tests/models tests/docs tests/diloco
test: $(STAMP)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not soak" $(LONGEST) tests

soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(SOAK_JOBS) --dist loadfile --timeout 3600 -m "soak"

# What may go wrong between a DiLoCo server and its workers, done to real processes, and the table of what comes of it.
faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.diloco.faults

# About two minutes of training on two CPU cores. Run again it continues, or finds the run finished.
demo: $(STAMP)
	$(BIN)/forgather -p configs/tiny_llama train --nproc 2
	test -d demo || $(BIN)/forgather export configs/tiny_llama/runs/train demo
	$(BIN)/python launch/sample.py demo

# Each prints ratios against a baseline that runs in the same process; the hand-written baselines stand beside them.
bench: $(STAMP)
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/parallel.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/construct.py
	$(BIN)/python benchmarks/model_speed.py
	$(BIN)/python benchmarks/diloco_exchange.py

clean:
	rm -rf $(VENV)
