#!/usr/bin/env bash
# One host, one process that drives all its GPUs (the recipes expect eight).
#   launch/local_8gpu.sh configs/llama2_7b_pretrain.py WORKDIR [--config.key=value ...]
# The same command goes on after a stop; Ctrl-C and SIGTERM save first.
set -euo pipefail
: "${2:?usage: $0 CONFIG WORKDIR [--config.key=value ...]}"
cd "$(dirname "$0")/.."
# Of a GPU's memory jax takes 75 % unless told: 60 of 80 GB.
export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-.95}
exec .venv/bin/python -m beacon_jax.train --config="$1" --workdir="$2" "${@:3}"
