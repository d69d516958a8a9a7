#!/usr/bin/env bash
# The whole test suite in .venv; arguments go to pytest, such as tests/sampling or -k packing.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
use_venv test
exec python -m pytest -n "${JAXRL_TEST_WORKERS:-2}" "$@"
