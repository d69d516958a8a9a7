#!/usr/bin/env bash
# Makes .venv with jaxrl and the extras given as arguments, and puts it on the PATH; to be sourced.
# PYTHON names the interpreter to make it with.
set -euo pipefail

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "jaxrl needs Python 3.11 or newer, but $python is $("$python" --version); set PYTHON=..." >&2
  exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
extras=$(IFS=,; echo "$*")
# Installing again costs seconds, so skip it while nothing that decides about it has changed.
stamp=".venv/installed-${extras:-base}"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  echo "installing jaxrl${extras:+ with $extras} into .venv ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
  touch "$stamp"
fi
PATH="$PWD/.venv/bin:$PATH"
