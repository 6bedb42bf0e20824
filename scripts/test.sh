#!/usr/bin/env bash
# Everything CI runs, from nothing: style, types, the import contract, all tests.
set -euo pipefail
EXTRAS="[dev]"
source "$(dirname "$0")/setup.sh"

ruff check .
ruff format --check .
lint-imports
# Types beside the tests: it is one process, and takes a minute.
mypy &
types=$!
# Two processes, a file of tests each, of one thread: the tests are many small networks, which a second thread would only hold up.
# Tests of the scripts install the project again meanwhile: the others find it by its path.
OMP_NUM_THREADS=1 PYTHONPATH="$PWD" python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
wait "$types"
