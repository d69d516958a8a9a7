# To be sourced. `use_venv EXTRA...` makes .venv with jaxrl and these extras and puts it on the PATH;
# PYTHON names the interpreter to make it with.

use_venv() {
  local python=${PYTHON:-python3} extras stamp
  extras=$(IFS=,; echo "$*")
  # Installing again costs seconds, so skip it while nothing that decides about it has changed.
  stamp=".venv/installed-${extras:-base}"
  if [ ! -x .venv/bin/python ] || [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    # What an interrupted call left behind may have a Python, but no pip yet.
    if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
      "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "jaxrl needs Python 3.11 or newer, but $python is $("$python" --version 2>&1);" \
             "set PYTHON=..." >&2
        exit 1
      }
      "$python" -m venv --clear .venv
    fi
    echo "installing jaxrl${extras:+ with $extras} into .venv ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --editable ".${extras:+[$extras]}"
    .venv/bin/python -m compileall -q jaxrl configs  # as pip does with packages that it copies
    touch "$stamp"
  fi
  PATH="$PWD/.venv/bin:$PATH"
}
