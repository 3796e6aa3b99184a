#!/usr/bin/env bash
# All workers of a Cloud TPU VM; run on your own machine, with gcloud logged in.
#   TPU=NAME ZONE=ZONE launch/tpu_vm.sh configs/X.py WORKDIR [--config.key=value ...]
# Before the first run, on every worker (the same ssh --worker=all): clone the repository
# to ~/beacon_jax (or set REPO) and run `make setup EXTRAS=tpu` in it. WORKDIR, the text
# and the weights must be on a disk that all workers share, mounted at the same place.
set -euo pipefail
: "${2:?usage: TPU=NAME ZONE=ZONE $0 CONFIG WORKDIR [--config.key=value ...]}"
: "${TPU:?the name of the TPU VM}" "${ZONE:?its zone}"
# Quoted once more, since it passes through the workers' shells.
run=$(printf '%q ' .venv/bin/python -m beacon_jax.train --config="$1" --workdir="$2" \
  --distributed "${@:3}")
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd ${REPO:-beacon_jax} && $run"
