#!/usr/bin/env bash
# TPUs of a GKE cluster, through xpk (pip install xpk).
#   CLUSTER=NAME DEVICE=v5p-16 IMAGE=... launch/gke_xpk.sh configs/X.py WORKDIR [...]
# PROJECT and ZONE default to those of gcloud. IMAGE holds this repository in its working
# directory, installed by `pip install -c constraints.txt ".[tpu]"`. WORKDIR, text and
# weights lie in a mounted storage (`xpk storage attach`) that all pods share.
set -euo pipefail
: "${2:?usage: CLUSTER= DEVICE= IMAGE= $0 CONFIG WORKDIR [--config.key=value ...]}"
: "${CLUSTER:?}" "${DEVICE:?as in --tpu-type, such as v5p-16}" "${IMAGE:?}"
where=(${PROJECT:+--project="$PROJECT"} ${ZONE:+--zone="$ZONE"})
run=$(printf '%q ' python -m beacon_jax.train --config="$1" --workdir="$2" \
  --distributed "${@:3}")
# A restarted pod goes on from the last checkpoint, as the same command always does.
exec xpk workload create --cluster="$CLUSTER" --workload="${NAME:-beacon-$(date +%s)}" \
  --tpu-type="$DEVICE" --num-slices="${SLICES:-1}" --docker-image="$IMAGE" \
  --max-restarts=10 "${where[@]}" --command="$run"
