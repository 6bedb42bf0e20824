#!/usr/bin/env bash
# Everything CI runs, from nothing: style, types, the import contract, all tests.
set -euo pipefail
EXTRAS="[dev]"
source "$(dirname "$0")/setup.sh"

ruff check .
ruff format --check .
mypy
lint-imports
# One thread: the tests are many small networks, and a second thread costs them more than it gives.
OMP_NUM_THREADS=1 python -m pytest "$@"
