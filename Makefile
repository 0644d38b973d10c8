# make run | test | test-slow | test-gpu | check | bench | experiments | anatomy | restore | train | train-dermatology | train-radiology
# Variables: HOST, PORT (make run); PRESET=cpu|gpu (training); SHIP=1 (write over assets/ and the README's tables);
# MEDVIZ_DATA (folder of training images); PYTEST_ARGS.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# That of what ships. Experiments go on from the cpu preset's runs.
PRESET ?= $(if $(filter experiments curve anatomy,$(MAKECMDGOALS)),cpu,gpu)
# Without SHIP, models and reports go to runs/unshipped, and nothing that ships changes.
SHIPPING = $(if $(SHIP),--ship)
MODELS = $(if $(SHIP),,runs/unshipped/)assets/models
export HOST ?= 127.0.0.1
export PORT ?= 7860
export GRADIO_ANALYTICS_ENABLED ?= False
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-dev browser run test test-slow test-gpu check bench experiments curve anatomy format report restore clean train train-dermatology train-radiology

help:
	@echo "make run                 install into $(VENV) what the app needs and start it on http://$(HOST):$(PORT)"
	@echo "make test                install what tests need and run the fast suite"
	@echo "make test-slow           also the slow tests"
	@echo "make test-gpu            the tests at Stable Diffusion's size, on a machine with a CUDA card"
	@echo "make check               ruff, format, types"
	@echo "make bench               our reinforcement learning beside TRL's DDPO, a quarter of an hour on two idle cores, minutes of compiling included"
	@echo "make experiments         methods and ways of training at one budget, synthetic pictures as augmentation, anatomy: six hours on two idle cores"
	@echo "make curve               what shipped before and what ships: distance from real images against compute, an hour and a half of one core"
	@echo "make anatomy             where phrases look and whether findings are drawn where a prompt puts them: an hour of it"
	@echo "make restore             lay the shipped models out as runs, to train on from them without training them again"
	@echo "make train-dermatology   train every part of a domain, evaluate it, write the tables (PRESET=cpu or gpu); SHIP=1 puts all into assets/"
	@echo "make train-radiology"
	@echo "make train               both; with -j3 on a card, stages that do not wait for each other share it"

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

# A run that was stopped goes on from its checkpoint; a finished one (it has metrics.json) is left alone: delete its folder to
# train it again. Prerequisites are order-only, so that a fresh checkout's file times start no training.
define stage
runs/$(2)/metrics.json: | $(VENV)/.dev $(foreach run,$(3),runs/$(run)/metrics.json)
	$(BIN)/python -m train $(1) train/recipes/$(2).yaml $$(if $$(wildcard runs/$(2)/checkpoint-*),--resume) $(SHIPPING)
endef

# The stage that finishes a domain's generator. The cpu preset goes on from the diffusion stage: for fine lines (refine), then
# for what captions say (coarse, longer), and for what lies on skin (wider, artefacts); the gpu preset does all in one.
GENERATOR_dermatology_cpu := artefacts
GENERATOR_radiology_cpu := longer
GENERATOR = $(or $(GENERATOR_$(1)_$(PRESET)),diffusion)-$(1)-$(PRESET)

# The decoder that ships: one for both domains, or one a domain behind the shared encoder.
DECODER = $(if $(filter cpu,$(PRESET)),decoder-cpu,decoder-$(1)-$(PRESET))
# Where one finishes the pictures of a domain's generator, that one ships.
FINISH_radiology_cpu := finish-radiology-cpu
SHIPPED_DECODER = $(or $(FINISH_$(1)_$(PRESET)),$(DECODER))

# The adapter that ships: where reinforcement learning goes on with the mean picture held, that one.
SETTLE_dermatology_gpu := settle-dermatology-gpu
ALIGNED = $(or $(SETTLE_$(1)_$(PRESET)),rl-$(1)-$(PRESET))

# The last of what a model folder is made of, and, where they ship, the gains by frequency that are measured on it without them.
PARTS = $(ALIGNED) distil-$(1)-$(PRESET) $(SHIPPED_DECODER) segmenter-$(1)-$(PRESET)
SPECTRUM_radiology_gpu := spectrum-radiology-gpu
SPECTRUM = $(SPECTRUM_$(1)_$(PRESET))

# Everything of one domain, then its model folder, its evaluation on the test split, and the tables.
define domain
$(call stage,contrastive,contrastive-$(1)-$(PRESET),)

$(call stage,diffusion,diffusion-$(1)-$(PRESET),autoencoder-$(PRESET) contrastive-$(1)-$(PRESET))

$(if $(filter cpu,$(PRESET)),$(call stage,diffusion,refine-$(1)-$(PRESET),diffusion-$(1)-$(PRESET)))

$(if $(filter cpu,$(PRESET)),$(call stage,diffusion,coarse-$(1)-$(PRESET),refine-$(1)-$(PRESET)))

$(if $(filter cpu,$(PRESET)),$(call stage,diffusion,longer-$(1)-$(PRESET),coarse-$(1)-$(PRESET)))

$(call stage,classifier,reward-$(1)-$(PRESET),)

$(call stage,classifier,judge-$(1)-$(PRESET),)

$(call stage,segmenter,segmenter-$(1)-$(PRESET),)

$(call stage,rl,rl-$(1)-$(PRESET),$(GENERATOR) $(DECODER) reward-$(1)-$(PRESET) judge-$(1)-$(PRESET))

$(if $(SETTLE_$(1)_$(PRESET)),$(call stage,rl,$(SETTLE_$(1)_$(PRESET)),rl-$(1)-$(PRESET)))

$(call stage,distil,distil-$(1)-$(PRESET),$(GENERATOR) $(DECODER) rl-$(1)-$(PRESET))

$(if $(filter cpu,$(PRESET)),,$(call stage,autoencoder,$(DECODER),autoencoder-$(PRESET)))

$(if $(FINISH_$(1)_$(PRESET)),$(call stage,finish,$(FINISH_$(1)_$(PRESET)),$(GENERATOR) $(DECODER) rl-$(1)-$(PRESET)))

$(if $(SPECTRUM),$(call stage,spectrum,$(SPECTRUM),$(PARTS)))

train-$(1): $(foreach run,$(PARTS) $(SPECTRUM),runs/$(run)/metrics.json)
	$(BIN)/python -m train assemble train/recipes/assemble-$(1)-$(PRESET).yaml $(SHIPPING)
	$(BIN)/python -m train evaluate train/recipes/evaluate-$(1)-$(PRESET).yaml --models $(MODELS) --split test $(SHIPPING)
	$(BIN)/python -m train evaluate train/recipes/evaluate-$(1)-$(PRESET).yaml --models $(MODELS) --split test --steps 4 $(SHIPPING)
	$(if $(SHIP),$(BIN)/python -m train examples $(1) $(SHIPPING))
	$(BIN)/python -m train report $(SHIPPING)
endef

$(eval $(call stage,autoencoder,autoencoder-$(PRESET),))
$(if $(filter cpu,$(PRESET)),$(eval $(call stage,autoencoder,decoder-cpu,autoencoder-cpu)))
$(foreach name,dermatology radiology,$(eval $(call domain,$(name))))

# Tables once more, when all that they tell of is there.
train: train-dermatology train-radiology
	$(BIN)/python -m train report $(SHIPPING)

# What looks for places in chest X-rays and, where it ships, for structures in dermoscopic images.
$(eval $(call stage,anatomy_prompts,anatomy-own-radiology-$(PRESET),$(call GENERATOR,radiology) segmenter-radiology-$(PRESET)))
train-radiology runs/spectrum-radiology-$(PRESET)/metrics.json: | runs/anatomy-own-radiology-$(PRESET)/metrics.json
ifneq ($(PRESET),cpu)
$(eval $(call stage,anatomy_prompts,structures-dermatology-$(PRESET),$(call GENERATOR,dermatology)))
train-dermatology: | runs/structures-dermatology-$(PRESET)/metrics.json
endif

ifeq ($(PRESET),cpu)
$(eval $(call stage,diffusion,wider-dermatology-cpu,longer-dermatology-cpu))
$(eval $(call stage,diffusion,artefacts-dermatology-cpu,wider-dermatology-cpu))
$(eval $(call stage,rl,rl-placement-radiology-cpu,longer-radiology-cpu segmenter-radiology-cpu reward-radiology-cpu judge-radiology-cpu))
$(eval $(call stage,contrastive,alignment-radiology-cpu,))
endif

$(VENV)/.bench: pyproject.toml $(VENV)/.dev
	$(BIN)/python -m pip install -qq --editable '.[train,bench]'
	@touch $@

# Tests of the benchmark that need the peer skip elsewhere and run here.
bench: $(VENV)/.bench
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/train/test_benchmark_rl.py
	$(BIN)/python -m train bench rl $(SHIPPING)

# All go on from what a stopped run finished. They need MEDVIZ_DATA and the cpu preset's runs of both domains, which make
# train-dermatology and make train-radiology train; make restore lays out the gpu preset's, which ship.
experiments: $(VENV)/.bench anatomy | runs/autoencoder-8-cpu/metrics.json runs/other-domain/metrics.json
	$(BIN)/python -m train methods train/recipes/methods-dermatology-cpu.yaml $(SHIPPING)
	$(BIN)/python -m train augmentation train/recipes/augmentation-dermatology-cpu.yaml $(SHIPPING)
	$(BIN)/python -m train choices train/recipes/choices-dermatology-cpu.yaml $(SHIPPING)
	$(BIN)/python -m train choices train/recipes/choices-radiology-cpu.yaml $(SHIPPING)
	$(BIN)/python -m train report $(SHIPPING)

# What two of the ways of training start from, at no cost that is counted.
runs/autoencoder-8-cpu/metrics.json: | $(VENV)/.dev
	$(BIN)/python -m train autoencoder train/recipes/autoencoder-cpu.yaml --latent-channels 8 --out runs/autoencoder-8-cpu
runs/other-domain/metrics.json: | $(VENV)/.dev
	$(BIN)/python -m train diffusion train/recipes/longer-dermatology-cpu.yaml --init '' --channels 48 96 128 --steps 400 \
		--warmup 50 --learning-rate 1.0e-3 --no-compile --orientations 1 --contrastive runs/diffusion-dermatology-gpu/model \
		--out runs/other-domain

# Generators that shipped before, out of the repository's history (a clone with all of it), on one curve with what ships.
FORMER := $(foreach commit,b2bc61f 384cc75 b8ca5d2 27e4b33 2d2dd0f,runs/former/$(commit)-radiology) \
	$(foreach commit,a58cdc1 384cc75 50d2a35 27e4b33 1ef2696 0a18650,runs/former/$(commit)-dermatology)
runs/former/%:
	mkdir -p runs/former/.writing-$*
	git archive $(firstword $(subst -, ,$*)) assets/models/$(lastword $(subst -, ,$*)) | tar -x --strip-components=3 -C runs/former/.writing-$*
	mv runs/former/.writing-$* $@

curve: $(VENV)/.bench | $(FORMER)
	$(BIN)/python -m train curve train/recipes/curve-radiology-gpu.yaml $(SHIPPING)
	$(BIN)/python -m train curve train/recipes/curve-dermatology-gpu.yaml $(SHIPPING)
	$(BIN)/python -m train report $(SHIPPING)

# The cpu preset's model folder beside what ships, which its adapters would not fit.
runs/models-cpu/radiology/manifest.json: | $(VENV)/.dev
	$(BIN)/python -m train assemble train/recipes/assemble-radiology-cpu.yaml $(@D)

anatomy: $(VENV)/.dev $(foreach run,alignment rl-placement,runs/$(run)-radiology-cpu/metrics.json) | runs/models-cpu/radiology/manifest.json
	$(BIN)/python -m train evaluate grounding train/recipes/grounding-radiology-gpu.yaml $(SHIPPING)
	$(BIN)/python -m train evaluate placement train/recipes/placement-radiology-gpu.yaml $(SHIPPING)
	$(BIN)/python -m train anatomy_variants train/recipes/anatomy-variants-radiology-cpu.yaml
	$(BIN)/python -m train anatomy_variants train/recipes/anatomy-variants-radiology-cpu.yaml --split test --inversion paper
	$(BIN)/python -m train evaluate grounding train/recipes/grounding-dermatology-gpu.yaml $(SHIPPING)
	$(BIN)/python -m train evaluate placement train/recipes/placement-radiology-cpu.yaml $(SHIPPING)
	$(BIN)/python -m train report $(SHIPPING)

# The preset of what ships, in both domains.
SHIPPED := gpu
restore: setup-dev
	$(foreach name,dermatology radiology,$(BIN)/python -m train restore train/recipes/assemble-$(name)-$(SHIPPED).yaml &&) true

report: setup-dev
	$(BIN)/python -m train report $(SHIPPING)

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
