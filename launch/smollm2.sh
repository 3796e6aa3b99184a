#!/usr/bin/env bash
# Trains beacons for SmolLM2-135M and measures them beside other methods, part by part.
#   MODEL=smol.gguf CORPUS=corpus [OUT=out/smollm2] [BATCH=4] launch/smollm2.sh [PART ...]
# Parts: train (configs/smollm2.py), text (loss of the last window and passkeys, 100 rows of
# 1K to 8K tokens), ruler (11 tasks, 2K, 30 rows), needle (and three turns, 2K). The same
# command goes on. Two CPU cores need about a day for the last three, by estimate. On a GPU:
# CONFIG=configs/smollm2.py:gpu BATCH=50. MODEL and CORPUS: see that config. BEACONS=FOLDER
# measures other beacons than those of train.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${MODEL:?names the GGUF file}" "${CORPUS:?names the folder that launch/corpus.sh made}"
python=${PYTHON:-.venv/bin/python} out=${OUT:-out/smollm2}
beacons=${BEACONS:-$out/train/adapter} config=${CONFIG:-configs/smollm2.py}
methods=full,window
for name in beacon streaming snapkv kvzip; do methods+=,$name,${name}_recent; done
evaluate() { # FOLDER [OPTION ...]
  "$python" -m beacon_jax.evaluate --model="$MODEL" --beacons="$beacons" --dtype=bfloat16 \
    --methods="${METHODS:-$methods}" --ratios=2,4,8 --text="$CORPUS" \
    --batch_size="${BATCH:-4}" --out="$out/$1" "${@:2}"
}
part() {
  case $1 in
    train) "$python" -m beacon_jax.train --config="$config" --workdir="$out/train" \
      --config.init_from="$MODEL" --config.data.sources="$CORPUS" ;;
    text) evaluate text --tasks=perplexity,passkey --lengths=1024,2048,4096,8192 \
      --samples="${ROWS:-100}" ;;
    ruler) evaluate ruler --tasks=ruler --lengths=2048 --samples="${ROWS:-30}" ;;
    needle) evaluate needle --tasks=needle,multi_needle --lengths=2048 \
      --samples="${ROWS:-30}" ;;
    *) echo "unknown part $1: use train, text, ruler or needle" >&2; return 2 ;;
  esac
}
(($#)) || set -- train text ruler needle
for name; do part "$name"; done
