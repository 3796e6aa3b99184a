#!/usr/bin/env bash
# Makes .venv and installs beacon_jax with its tools; does nothing when that is done.
#   make setup [PYTHON=/path/to/python] [EXTRAS=test,cuda12]
# VENV=.venv-aot makes another one beside it, for extras that would get in the way;
# JAX=0.11.2 gives it another jax than that of constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
python=$venv/bin/python
stamp=$venv/.installed
# The folder is part of the stamp: an editable install holds its path. So are the extras
# of another environment, which nobody chooses by hand.
state=$(echo "$PWD ${VENV:+${EXTRAS:-}} ${JAX:-}" | cat - pyproject.toml constraints.txt launch/setup.sh | cksum)
extras=${EXTRAS:-test,docs}

identity='import sys, pip; assert sys.version_info >= (3, 12)
print(sys.base_prefix, sys.version_info)'
have=$("$python" -c "$identity" 2>/dev/null) || have="none that runs"
base=""
if [[ -n ${PYTHON:-} || $have == "none that runs" ]]; then
  base=$(bash launch/find_python.sh)
  identity=${identity/, pip/} # a base Python may do without pip, .venv may not
  [[ $("$base" -c "$identity") != "$have" ]] || base=""
fi

if [[ -n $base ]]; then
  echo "setup: making $venv with $base"
  "$base" -m venv --clear "$venv"
elif [[ ( -z ${EXTRAS:-} || -n ${VENV:-} ) && -f $stamp && $(<"$stamp") == "$state" ]]; then
  exit 0
fi

echo "setup: installing beacon_jax[$extras] into $venv"
SECONDS=0
rm -f "$stamp"
# uv installs everything in seconds; pip needs minutes but is always there.
"$python" -m uv --version >/dev/null 2>&1 ||
  "$python" -m pip install --quiet --constraint constraints.txt uv ||
  echo "setup: uv cannot be installed here"
constraints=constraints.txt
if [[ -n ${JAX:-} ]]; then
  constraints=$venv/constraints.txt
  grep -vE '^(jax(lib|-cuda12-pjrt|-cuda12-plugin)?|libtpu)==' constraints.txt >"$constraints"
  for package in jax jaxlib jax-cuda12-pjrt jax-cuda12-plugin; do
    echo "$package==$JAX" >>"$constraints"
  done
fi
install=(install --quiet --constraint "$constraints" --editable ".[$extras]")
if ! "$python" -m uv pip "${install[@]}" --python "$python"; then
  echo "setup: continuing with pip (some minutes)"
  "$python" -m pip "${install[@]}"
fi
echo "$state" >"$stamp"
echo "setup: done in $SECONDS s"
