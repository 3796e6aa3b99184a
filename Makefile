# Every target does its own set-up: a fresh clone needs nothing else.
#   make setup PYTHON=/path/to/python    another interpreter
#   make setup EXTRAS=test,cuda12   with an accelerator (cuda12, cuda13 or tpu)
PYTHON ?=
EXTRAS ?=
PY := .venv/bin/python
CODE := $(wildcard beacon_jax configs tests launch benchmarks)
MAX_LINES := 600
# The environment may forbid bytecode; compiling jax and transformers anew in every
# process costs seconds each time.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONUNBUFFERED := 1

.PHONY: help setup quickstart test test-slow stress notebook aot lint constraints clean

help:
	@echo "targets: setup quickstart test test-slow stress notebook aot lint constraints clean"

setup:
	@PYTHON="$(PYTHON)" EXTRAS="$(EXTRAS)" bash launch/setup.sh

# Convert the tiny base model, train beacons on it, measure them: minutes on two cores.
# Two CPU devices share a batch 1.45 times as fast as two threads of one.
OUT := out/quickstart
quickstart: setup
	$(PY) -m beacon_jax.convert from-hf --src=assets/tiny-base --dst=$(OUT)/base --overwrite
	JAX_NUM_CPU_DEVICES=2 $(PY) -m beacon_jax.train --config=configs/quickstart.py \
	  --workdir=$(OUT)/train --config.init_from=$(OUT)/base
	$(PY) -m beacon_jax.evaluate --model=$(OUT)/train/export --tasks=perplexity,passkey \
	  --ratios=2,4,8 --methods=beacon,full,window --out=$(OUT) --floors=quickstart \
	  --summary=$(OUT)/train/summary.json

test: setup
	JAX_PLATFORMS=cpu $(PY) -m pytest -n 2 --dist loadfile tests

# Training runs and large shapes: not part of `make test`.
test-slow: setup
	JAX_PLATFORMS=cpu $(PY) -m pytest -m slow tests

# 30,000 launches on two CPU devices with every core busy, three times: none may hang.
stress: setup
	$(PY) -m benchmarks.stress_collectives

# Every cell of the Colab notebook, small, on the CPU. UPDATE=1 keeps the outputs of its
# results in the file, as it is committed.
UPDATE ?=
notebook: setup
	$(PY) launch/notebook.py $(if $(UPDATE),--update)

# Attention kernels and whole 7B training steps for GPUs and TPUs that are not here,
# compiled by XLA: what they need per device. An environment of its own: CUDA and TPU
# plugins beside the CPU. AOT_KERNELS, AOT_STEPS: some of the cases; all by default.
AOT_KERNELS ?=
AOT_STEPS ?=
aot:
	@VENV=.venv-aot EXTRAS=aot PYTHON="$(PYTHON)" bash launch/setup.sh
	.venv-aot/bin/python -m benchmarks.aot_kernels --cases=$(AOT_KERNELS) --out=out/aot
	.venv-aot/bin/python -m benchmarks.aot --cases=$(AOT_STEPS) --out=out/aot

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright
	@find $(CODE) -name '*.py' -o -name '*.sh' | xargs wc -l | awk '$$2 != "total" && \
	  $$1 > $(MAX_LINES) { print $$2 ": " $$1 " lines, more than $(MAX_LINES): split it"; \
	  bad = 1 } END { exit bad }'

# After a change of the dependencies: versions only, for every platform.
constraints: setup
	$(PY) -m uv pip compile pyproject.toml --universal --python-version 3.12 --quiet \
	  --upgrade --extra test --extra aot --no-header --no-annotate \
	  --no-emit-index-url --output-file constraints.txt

clean:
	rm -rf .venv .venv-aot $(OUT) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
