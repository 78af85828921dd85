# `make serve` and `make test` are all a newcomer needs; each makes .venv on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CLIENTS_VENV := .venv-clients
PAGE_VENV := .venv-page
MODEL  ?=
PORT   ?= 8000
CONFIG ?= $(if $(MODEL),,configs/demo.yaml)
ARGS   ?=
HOURS  ?= 0.5

.PHONY: help serve test test-clients test-page test-deploy faults soak check format bench bench-gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make serve [MODEL=folder-or-hub-id] [PORT=8000] [ARGS='--max-num-seqs 32 ...']"
	@echo "make test-clients [VLLM=path] [CLIENTS='openai langchain ...']"
	@echo "make test-page [ARGS='-k keyboard'] (needs Debian's chromium)"
	@echo "make test-deploy (needs Debian's nginx and prometheus)"
	@echo "make faults [ARGS='overload ...'] | make soak [HOURS=24]"
	@echo "make test | make check | make format | make bench [PORT=8000] [ARGS='--concurrency 8 ...'] (needs a server)"
	@echo "make bench-gpu [ARGS='--rounds 5 ...'] (needs a CUDA device)"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

serve: $(VENV)/.installed
	$(BIN)/idefics2-server serve $(MODEL) $(if $(CONFIG),--config $(CONFIG)) --port $(PORT) $(ARGS)

# Half a gigabyte that only tests need: what interprets the kernels for CUDA on a machine without it.
$(VENV)/.kernels: $(VENV)/.installed
	$(BIN)/python -c 'import triton' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[kernels]'
	@touch $@

# Two workers, each with its own servers and the tests of whole files; more would need more memory than cores.
test: $(VENV)/.kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

$(CLIENTS_VENV)/.installed: tests/clients/requirements.txt constraints.txt
	$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(CLIENTS_VENV)/bin/python -m pip install --quiet --no-deps --requirement tests/clients/requirements.txt
	@touch $@

test-clients: $(VENV)/.installed $(CLIENTS_VENV)/.installed
	SERVER_PYTHON=$(abspath $(BIN)/python) $(CLIENTS_VENV)/bin/python -m pytest -m clients tests/clients $(ARGS)

$(PAGE_VENV)/.installed: tests/web/requirements.txt
	$(PYTHON) -m venv $(PAGE_VENV)
	$(PAGE_VENV)/bin/python -m pip install --quiet --no-deps --requirement tests/web/requirements.txt
	@touch $@

test-page: $(VENV)/.installed $(PAGE_VENV)/.installed
	SERVER_PYTHON=$(abspath $(BIN)/python) OMP_NUM_THREADS=1 $(PAGE_VENV)/bin/python -m pytest -m web $(or $(ARGS),tests/web)

test-deploy: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m deploy tests/deploy $(ARGS)
	cd deploy/prometheus && promtool check config prometheus.yml && promtool test rules alerts_test.yml

faults: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults $(ARGS)

soak: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --hours $(HOURS) $(ARGS)

bench: $(VENV)/.installed
	$(BIN)/idefics2-server bench --base-url http://127.0.0.1:$(PORT) $(ARGS)

# The engine on a GPU, without HTTP, in the published shape with random weights.
bench-gpu: $(VENV)/.installed
	test -e $(or $(MODEL),models/8b-shape)/config.json || $(BIN)/idefics2-server make-demo models/8b-shape --size 8b --dtype bfloat16 --no-weights
	$(BIN)/python -m server.bench.gpu $(or $(MODEL),models/8b-shape) $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff check server tests
	$(BIN)/ruff format --check server tests
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

format: $(VENV)/.installed
	$(BIN)/ruff check --fix server tests
	$(BIN)/ruff format server tests

clean:
	rm -rf $(VENV) $(CLIENTS_VENV) $(PAGE_VENV) build *.egg-info
