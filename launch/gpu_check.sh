#!/usr/bin/env bash
# Everything worth knowing about ONE GPU in under 9 minutes, part by part: kernel parity
# and timing, 7B prefill and decoding at 32K and 128K, a training step at 20K with MFU.
#   [PYTHON=python3] [OUT=FOLDER] [PRESET=qwen2-7b] launch/gpu_check.sh [PART ...]
# The same command goes on: parts that are done with this code are skipped, rows that a
# part had measured before its time was up are not measured again. Needs (or make setup):
#   pip install "jax[cuda12]" absl-py flax jaxtyping matplotlib ml-collections optax \
#     orbax-checkpoint tokenizers transformers pytest pytest-timeout
# and, on a Hopper GPU, tokamax==0.0.17, which is then timed beside our kernels.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} out=${OUT:-out/gpu_check} preset=${PRESET:-llama2-7b}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} PYTHONUNBUFFERED=1
export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-.95}
mkdir -p "$out"
bench() { # SECONDS [OPTION ...]
  timeout -k 5 "$1" "$python" -m beacon_jax.bench --preset="$preset" --out="$out" \
    --repeats=3 "${@:2}"
}
part() {
  case $1 in
    parity) bench 60 --parts=parity && timeout -k 5 50 "$python" -m pytest -q -p \
      no:cacheprovider tests/attention -k "not tpu and not eight_devices and not bias" ;;
    kernels) bench 110 --kernels --queries="${QUERIES:-1536}" ;;
    prefill) bench 155 --parts=prefill --lengths=32768,131072 --ratios=4,8 ;;
    decode) bench 70 --parts=decode --lengths=32768,131072 --ratios=4,8 --batches=1,8 ;;
    train) bench 90 --parts=train --lengths=20480 ;;
    *) echo "unknown part: use parity, kernels, prefill, decode or train" >&2; return 2 ;;
  esac
}
(($#)) || set -- parity kernels prefill decode train
code=$(find beacon_jax tests/attention -name '*.py' -exec cksum {} + | sort -k 3 | cksum)
failed=()
for name; do
  mark="$name $preset ${code% *}"
  grep -qsxF "$mark" "$out/done" && { echo "$name: done before"; continue; }
  if part "$name"; then echo "$mark" >>"$out/done"; else failed+=("$name: exit $?"); fi
done
((${#failed[@]} == 0)) || { printf 'not done: %s\n' "${failed[@]}" >&2; exit 1; }
