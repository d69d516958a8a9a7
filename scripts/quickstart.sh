#!/usr/bin/env bash
# From a fresh clone to a trained model and a picture: about a minute to install, three to train.
# Arguments go to `jaxrl run`, such as --config.seed=1 or --workdir=DIR.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
use_venv
exec python -m jaxrl run --config=configs/quickstart.py --workdir=runs/quickstart "$@"
