#!/usr/bin/env bash
# Does this machine train? Shows the GPUs that jax sees, then takes a few tiny steps.
#   launch/gpu_check.sh [CONFIG:smoke [WORKDIR [--config.key=value ...]]]
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/python - <<'PY'
import jax
print(f"jax {jax.__version__}:", *jax.devices())
if jax.default_backend() != "gpu":
    raise SystemExit("jax sees no GPU: make setup EXTRAS=test,eval,cuda12 (or cuda13)")
PY
workdir=${2:-$(mktemp -d)} # a new folder, or the run of last time would be gone on with
.venv/bin/python -m beacon_jax.train --config="${1:-configs/qwen2_7b_pretrain.py:smoke}" \
  --workdir="$workdir" "${@:3}"
