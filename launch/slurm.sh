#!/usr/bin/env bash
# Slurm, one process per node. From the repository, with WORKDIR on a shared disk:
#   sbatch [--nodes=4] launch/slurm.sh configs/X.py WORKDIR [--config.key=value ...]
# The recipes are made for one node of eight GPUs: for two, add --config.mesh.data=16 (or
# mesh.fsdp) and --config.data.stages.stage1.batch_size=16, the same for every stage.
#SBATCH --job-name=beacon --nodes=2 --ntasks-per-node=1 --gpus-per-node=8
#SBATCH --exclusive --mem=0 --time=24:00:00 --requeue --open-mode=append
# Five minutes before the end the steps get SIGTERM and save; sbatch again to go on.
#SBATCH --signal=TERM@300
set -euo pipefail
: "${2:?usage: sbatch $0 CONFIG WORKDIR [--config.key=value ...]}"
# Under Slurm jax takes every process for one of many on its node and shows it a single
# GPU, that of its local id: with one process per node seven would stay idle, silently.
# This names them all. They count from 0 among those that Slurm gave to the job, so do
# not add --gpus-per-task, which hides GPUs from the process.
last=$((${SLURM_GPUS_ON_NODE:-8} - 1))
JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 "$last")
export JAX_LOCAL_DEVICE_IDS
export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-.95} # jax's default is .75
# After SIGTERM one process may end (143) while another still writes the checkpoint: Slurm
# must not kill the rest. Those that a crash leaves behind end by jax's own heartbeat.
srun --cpu-bind=none --kill-on-bad-exit=0 .venv/bin/python -m beacon_jax.train \
  --config="$1" --workdir="$2" --distributed "${@:3}"
