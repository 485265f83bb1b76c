# Everything one does with this repository. A target first makes the environment if it needs one: a
# fresh clone takes python3 (3.11 or newer), make and git. `make help` lists the targets.

PYTHON ?= python3

# Another interpreter gets an environment of its own, so that two can be tested side by side.
ifeq ($(PYTHON),python3)
VENV := .venv
else
SERIES := import sys; print("%d.%d" % sys.version_info[:2])
VENV := .venv-$(shell "$(PYTHON)" -c '$(SERIES)' 2>/dev/null)
endif
BIN := $(VENV)/bin
READY := $(VENV)/.set-up
READY_GPU := $(VENV)/.set-up-gpu
READY_ABSENT := $(VENV)/.set-up-absent

# PyTorch gets an environment of its own: it is only measured against.
TORCH_VENV := $(VENV)-torch
READY_TORCH := $(TORCH_VENV)/.set-up
TORCH_PINS := experiments/bench/torch-requirements.txt

EXTRAS := dev,exchange,experiments
# Installed first and used without build isolation, which would fetch unpinned ones.
BUILD_TOOLS := hatchling editables
PIP_INSTALL := -m pip --disable-pip-version-check -qq install
PINNED_INSTALL := $(BIN)/python $(PIP_INSTALL) --constraint constraints.txt
INSTALL_PACKAGE := $(PINNED_INSTALL) --no-build-isolation --editable

# Each worker runs eight simulated devices; PYTEST_ARGS="-n 0" runs all in one process.
PYTEST := $(BIN)/python -m pytest -n 2

TRAIN_VARIABLES := DATA TARGET LOSS WIDTHS ACTIVATION X Y DATA_PARALLEL DEVICES LAYOUT L2 \
                   STEPS BATCH LR SEED SEEDS OUT

# $(call flag,DATA_PARALLEL) is --data-parallel='TEXT' if make's own command line gives it: a name
# like OUT or X may be in anyone's environment. An empty TEXT is nothing, but for WIDTHS, where it
# is a linear model. TEXT arrives as typed: spaces, commas, dollar signs and apostrophes included.
given = $(findstring command line,$(origin $(1)))
meant = $(and $(given),$(or $(value $(1)),$(filter WIDTHS,$(1))))
flag = $(if $(meant),--$(shell echo $(1) | tr A-Z_ a-z-)='$(subst ','\'',$(value $(1)))')

# $(call refuse,MESSAGE) ends a recipe line: what happens when its command fails.
refuse = 2>/dev/null || { echo 'PYTHON must $(1)' >&2; exit 1; }
GOT = got PYTHON=$(PYTHON)
OTHER = or say make PYTHON=/path/to/python3.12

define CHECK_PYTHON
@"$(PYTHON)" -c '' \
    $(call refuse,name an interpreter: $(GOT). Install Python 3.11 or newer $(OTHER).)
@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    $(call refuse,be 3.11 or newer: $(GOT). Install one $(OTHER).)
@"$(PYTHON)" -c 'import ensurepip, venv' \
    $(call refuse,have ensurepip and venv: $(GOT). On Debian: apt install python3-venv.)
endef

.DEFAULT_GOAL := help
.PHONY: help setup train verify picture graph parallelism bench bench-torch bench-gpu absent test \
        test-all test-gpu test-aot check format pins clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo 'make PYTHON=/path/to/python3.12 TARGET uses that interpreter, in .venv-3.12.'
	@echo 'make train takes $(wordlist 1,8,$(TRAIN_VARIABLES))'
	@echo '           $(wordlist 9,99,$(TRAIN_VARIABLES)), as NAME=value.'
	@echo 'make bench, bench-torch and bench-gpu take BENCH_ARGS="..."; "--help" explains them.'
	@echo 'make absent takes ABSENT_ARGS="...", make graph GRAPH_ARGS="..." and'
	@echo '           make parallelism PARALLELISM_ARGS="..." likewise.'
	@echo 'make test, test-all, test-gpu and test-aot take PYTEST_ARGS="..." for pytest.'

setup: $(READY) ## Make the environment with pinned packages; targets that need it do so first
	@echo '$(VENV) is ready.'

$(READY): pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	@echo 'Setting up $(VENV): a few minutes the first time.'
	@"$(PYTHON)" -m venv $(VENV)
	@$(PINNED_INSTALL) $(BUILD_TOOLS)
	@$(INSTALL_PACKAGE) '.[$(EXTRAS)]'
	@touch $@

$(READY_GPU): $(READY)
	@echo 'Adding the CUDA packages to $(VENV).'
	@$(INSTALL_PACKAGE) '.[cuda]'
	@touch $@

$(READY_ABSENT): $(READY)
	@echo 'Adding the compilers for TPU and CUDA to $(VENV): some GB.'
	@$(INSTALL_PACKAGE) '.[tpu,cuda]'
	@touch $@

$(READY_TORCH): $(TORCH_PINS)
	$(CHECK_PYTHON)
	@echo 'Setting up $(TORCH_VENV) with PyTorch: some GB where its wheel brings CUDA along.'
	@"$(PYTHON)" -m venv $(TORCH_VENV)
	@$(TORCH_VENV)/bin/python $(PIP_INSTALL) --requirement $(TORCH_PINS)
	@touch $@

train: $(READY) ## Train on handwritten digits, or on DATA=file.npz or file.csv; write results/train
	@$(BIN)/python -m experiments.train $(foreach name,$(TRAIN_VARIABLES),$(call flag,$(name)))

verify: $(READY) ## Compare every tensor with the unsharded reference, on all meshes
	@$(BIN)/python -m experiments.verify

picture: $(READY) ## Draw one layer on its devices: docs/layer.svg and results/layer.png
	@$(BIN)/python -m experiments.picture

bench: $(READY) ## Time and weigh the kernel against plain JAX; write results/bench (under an hour)
	@$(BIN)/python -m experiments.bench $(BENCH_ARGS)

bench-torch: $(READY) $(READY_TORCH) ## Time the kernel against PyTorch's tensor parallelism
	@$(BIN)/python -m experiments.bench.pytorch --python $(TORCH_VENV)/bin/python $(BENCH_ARGS)

bench-gpu: $(READY) ## Time a train step on a GPU against a bare product and plain JAX
	@nvidia-smi --list-gpus 2>/dev/null || { echo 'bench-gpu needs an NVIDIA GPU: none is here.' >&2; exit 2; }
	@$(MAKE) --no-print-directory $(READY_GPU)
	@JAX_PLATFORMS=cuda,cpu $(BIN)/python -m experiments.bench.gpu $(BENCH_ARGS)

graph: $(READY) ## Train a language model and an autoencoder, sharded and not; write results/graph
	@$(BIN)/python -m experiments.graph $(GRAPH_ARGS)

parallelism: $(READY) ## Compare tensor and pipeline parallel: bytes, memory, time; write results/parallelism
	@$(BIN)/python -m experiments.parallelism $(PARALLELISM_ARGS)

absent: $(READY_ABSENT) ## Compile the step for TPUs and GPUs that are not here, and count what is in it
	@$(BIN)/python -m experiments.absent $(ABSENT_ARGS)

test: $(READY) ## Run the suite and the doctests, on simulated CPU devices
	@$(PYTEST) $(PYTEST_ARGS)

test-all: $(READY) ## Run the suite and every strategy, mesh and clean run; goes on where it was stopped
	@$(PYTEST) -p tests.resume -o python_files="test_*.py every_*.py" $(PYTEST_ARGS); \
	    status=$$?; [ $$status -eq 5 ] && echo 'Everything has passed before.' || exit $$status

test-gpu: $(READY_GPU) ## Run the tests marked gpu, on a CUDA device
	@JAX_PLATFORMS=cuda,cpu $(PYTEST) -n 0 -m gpu $(PYTEST_ARGS)

test-aot: $(READY_ABSENT) ## Run the tests marked aot: what the compilers for TPU and CUDA make of the step
	@$(PYTEST) -n 0 -m aot $(PYTEST_ARGS)

check: $(READY) ## Check format, lint and types, changing nothing
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY) ## Format the code and apply the lint fixes that are safe
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

pins: ## Print what pip would choose under PYTHON today, as lines for constraints.txt
	$(CHECK_PYTHON)
	@"$(PYTHON)" -m venv --clear $(VENV)-pins
	@$(VENV)-pins/bin/python $(PIP_INSTALL) $(BUILD_TOOLS) '.[$(EXTRAS)]'
	@$(VENV)-pins/bin/python -m pip freeze --exclude tpmlp
	@rm -rf $(VENV)-pins

clean: ## Remove the environments of PYTHON, caches and build output; results stay
	@rm -rf $(VENV) $(TORCH_VENV) build dist .hypothesis .pytest_cache .ruff_cache
	@find tpmlp tests experiments -name __pycache__ -prune -exec rm -rf {} +
