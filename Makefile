# Every target sets up what it needs by itself, in virtual environments below .venv/.
# `make demo` and `make test` are all a new user has to know.
PYTHON ?= python3
VENV   := .venv
DEV    := $(VENV)/dev
DEMO   := $(VENV)/demo
SOURCES := pyproject.toml CMakeLists.txt $(wildcard transport/native/* memfabric/native/*) \
           $(shell find memfabric transport -name '*.py' -o -name '*.txt' -o -name '*.pyi')
PYTEST  := $(DEV)/bin/python -m pytest

.PHONY: help setup demo demo-hosts test test-fast test-rdma test-gpu lint type format bench bench-hosts docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(DEV)/.ready ## virtual environment with memfabric and the development tools

demo: $(DEMO)/.ready ## the main job: prefill and decode of a real model share KV blocks through the pool
	$(DEMO)/bin/memfabric demo --out out/demo

demo-hosts: $(DEMO)/.ready ## the same between two hosts (network namespaces), over UCX and TCP; needs root
	$(DEMO)/bin/memfabric demo --hosts --out out/demo-hosts

test: $(DEMO)/.ready $(DEV)/.ready ## all tests, the demonstration with the real model among them
	$(PYTEST) -m "not demo"
	$(DEMO)/bin/python -m pytest tests/demo tests/client/test_client.py::test_torch_tensors

test-rdma: $(DEV)/.ready ## verbs and UCX over RoCE, in virtual machines with Soft-RoCE devices (x86-64, Debian or alike)
	scripts/rxe-vm --nodes 2 --time-limit 400 -- $(DEV)/bin/python -m tests.rdma.two_guests
	scripts/rxe-vm --time-limit 2400 --pyverbs --hugepages 8 --apt libucx0 -- \
	  $(DEV)/bin/python -m pytest tests/rdma --durations=10

test-gpu: $(DEV)/.ready ## GPU memory on this machine's first CUDA device, and what it costs; needs NVIDIA's driver
	scripts/make-venv "$(PYTHON)" $(DEV) '.[dev,bench,cuda]'
	$(DEV)/bin/python -m pytest tests/gpu -rs -m gpu
	$(DEV)/bin/python -m perf.gpu

test-fast: $(DEV)/.ready ## tests without processes and models
	$(PYTEST) -m "not demo and not processes"

lint: $(DEV)/.ready ## ruff (rules and format) and the layers
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/lint-imports

type: $(DEV)/.ready ## mypy --strict
	$(DEV)/bin/mypy

format: $(DEV)/.ready ## format the code
	$(DEV)/bin/ruff check --fix .
	$(DEV)/bin/ruff format .

bench: $(DEV)/.ready ## benchmarks, as ratios to limits measured in the same run
	$(DEV)/bin/python -m perf.bench --out out/bench

bench-hosts: $(DEV)/.ready ## benchmarks between two hosts (network namespaces), over UCX and TCP; needs root
	$(DEV)/bin/python -m perf.fabric --out out/bench-hosts

clean: ## remove what the other targets made
	rm -rf $(VENV) build out .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(DEV)/.ready: $(SOURCES)
	scripts/make-venv "$(PYTHON)" $(DEV) '.[dev,bench]'

$(DEMO)/.ready: $(SOURCES)
	scripts/make-venv "$(PYTHON)" $(DEMO) '.[demo,test,ucx]'
