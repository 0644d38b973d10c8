# make run | test | test-slow | test-gpu | check | bench | experiments | grounding | restore | train | train-dermatology | train-radiology
# Variables: HOST, PORT (make run); DEVICE, RUN_ARGS (training, e.g. RUN_ARGS=--dry-run); SHIP=1 (write over assets/ and the README's
# tables); MEDVIZ_DATA (folder of training images); PYTEST_ARGS.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Without SHIP, models and reports go to runs/unshipped, and nothing that ships changes.
SHIPPING = $(if $(SHIP),--ship)
export HOST ?= 127.0.0.1
export PORT ?= 7860
export GRADIO_ANALYTICS_ENABLED ?= False
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-dev browser run test test-slow test-gpu check bench experiments grounding format report restore clean train train-dermatology train-radiology

help:
	@echo "make run                 install into $(VENV) what the app needs and start it on http://$(HOST):$(PORT)"
	@echo "make test                install what tests need and run the fast suite"
	@echo "make test-slow           also the slow tests"
	@echo "make test-gpu            the tests at Stable Diffusion's size, on a machine with a CUDA card"
	@echo "make check               ruff, format, types"
	@echo "make bench               our reinforcement learning beside TRL's DDPO, a quarter of an hour on two idle cores, minutes of compiling included"
	@echo "make experiments         methods at one budget, synthetic pictures as augmentation: hours on two idle cores"
	@echo "make grounding           where phrases look and whether findings are drawn where a prompt puts them: an hour"
	@echo "make restore             lay the shipped models out as runs, to train on from them"
	@echo "make train-dermatology   train every part of a domain, make its model folder, evaluate it (DEVICE=cpu or cuda, RUN_ARGS=--dry-run); SHIP=1 puts all into assets/"
	@echo "make train-radiology"
	@echo "make train               both"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "medviz needs Python 3.11 or newer; name one with: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp is newer than what it was made from, so that a changed requirement installs again and nothing else does.
$(VENV)/.runtime: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install -qq -r requirements.txt
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.runtime
	$(BIN)/python -m pip install -qq --editable '.[train,test,dev]'
	@touch $@

setup: $(VENV)/.runtime

setup-dev: $(VENV)/.dev

# The browser test drives the system's Chromium. Without one, and without the right to install one, it says so and skips.
browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; \
		fi; } || echo "no Chromium and no right to install it: the browser tests will be skipped" >&2

run: setup
	$(BIN)/python app.py

# Tests need no network: offline mode turns any attempt into an error at once.
# A test and what it starts take one core: as many files at a time as there are cores, a GB of memory each.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile
test: setup-dev browser
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu" $(PYTEST_ARGS)

test-slow: setup-dev browser
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not gpu" $(PYTEST_ARGS)

# Nothing else runs these: they need a CUDA card with 24 GB, and no weights are downloaded. Elsewhere they say so and skip.
test-gpu: setup-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every stage of a domain in its order; the same command goes on after a stop. `--dry-run` prints the plan.
DEVICE ?=
train-dermatology train-radiology: train-%: setup-dev
	$(BIN)/python -m train run $* $(if $(DEVICE),--device $(DEVICE)) $(RUN_ARGS) $(SHIPPING)

train: train-dermatology train-radiology

$(VENV)/.bench: pyproject.toml $(VENV)/.dev
	$(BIN)/python -m pip install -qq --editable '.[train,bench]'
	@touch $@

# Tests of the benchmark that need the peer skip elsewhere and run here.
bench: $(VENV)/.bench
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/train/test_benchmark_rl.py
	$(BIN)/python -m train bench rl $(SHIPPING)

# Both go on after a stop. They need MEDVIZ_DATA and the runs of dermatology: make restore lays out those that ship.
experiments: $(VENV)/.bench
	$(BIN)/python -m train methods train/recipes/methods-dermatology.yaml $(SHIPPING)
	$(BIN)/python -m train augmentation train/recipes/augmentation-dermatology.yaml $(SHIPPING)
	$(BIN)/python -m train report $(SHIPPING)

# Where phrases look in real images, and whether findings are drawn where a prompt puts them.
grounding: setup-dev
	$(BIN)/python -m train evaluate grounding train/recipes/grounding.yaml --domain radiology $(SHIPPING)
	$(BIN)/python -m train evaluate grounding train/recipes/grounding.yaml --domain dermatology $(SHIPPING)
	$(BIN)/python -m train evaluate placement train/recipes/placement-radiology.yaml $(SHIPPING)
	$(BIN)/python -m train report $(SHIPPING)

# The shipped models as runs, to go on from them without training them again.
restore: setup-dev
	$(BIN)/python -m train restore train/recipes/assemble-dermatology.yaml
	$(BIN)/python -m train restore train/recipes/assemble-radiology.yaml

report: setup-dev
	$(BIN)/python -m train report $(SHIPPING)

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
