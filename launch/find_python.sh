#!/usr/bin/env bash
# Prints the path of a Python 3.12 to 3.14 that really runs, else says what it tried.
# Only shell builtins: it must work on a machine where little else does. A name on
# PATH proves nothing (a pyenv shim exists and fails), so every candidate is run.
set -u
# jax 0.11 needs 3.12; the pinned array_record and its like have no wheels for 3.15.
check='import sys
if not (3, 12) <= sys.version_info < (3, 15): sys.exit("is Python %d.%d" % sys.version_info[:2])
import venv, ensurepip
print(getattr(sys, "_base_executable", None) or sys.executable)'
tried=""

try() { # prints the real path and exits when "$1" will do, else notes why it does not
  [[ $tried == *$'\n'"  $1: "* ]] && return
  local found
  if found=$("$1" -c "$check" 2>/dev/null </dev/null) && [[ -n $found ]]; then
    echo "$found"
    exit 0
  fi
  found=$("$1" -c "$check" 2>&1 </dev/null)
  found=${found%%$'\n\n'*} # a shim adds advice after an empty line
  tried+=$'\n'"  $1: ${found##*$'\n'}"
}

fail() {
  echo "setup: found no Python 3.12, 3.13 or 3.14 that runs and can make a virtual environment." >&2
  echo "Tried:$tried" >&2
  echo "Point to one:  make setup PYTHON=/path/to/python3.12" >&2
  echo "or install one: pyenv install 3.12, uv python install 3.12, or your system's" \
    "packages (on Debian and Ubuntu with python3-venv)." >&2
  exit 1
}

if [[ -n ${PYTHON:-} ]]; then # asked for by name: use it or fail, never another one
  try "$PYTHON"
  fail
fi
# 3.12 first: the version that the tests and the reported numbers ran with.
for name in python3.12 python3.13 python3.14 python3; do
  paths=$(type -aP "$name") || tried+=$'\n'"  $name: not on PATH"
  while read -r path; do [[ -n $path ]] && try "$path"; done <<<"$paths"
done
roots=$(pyenv root 2>/dev/null)$'\n'${PYENV_ROOT:-}$'\n'${HOME:-}/.pyenv
while read -r root; do
  for path in "$root"/versions/*/bin/python; do
    [[ -n $root && -x $path ]] && try "$path"
  done
done <<<"$roots"
managed=${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-${HOME:-}/.local/share}/uv/python}
for path in "$managed"/cpython-3.*/bin/python3; do
  [[ -x $path ]] && try "$path"
done
tried+=$'\n'"  versions/*/bin/python under \$(pyenv root), \$PYENV_ROOT and ~/.pyenv"
tried+=$'\n'"  $managed/cpython-3.*/bin/python3"
fail
