# Sourced by the other scripts: makes .venv and installs the project with the extras in EXTRAS (none by default), from nothing.
# PYTHON chooses the interpreter (3.11 or newer).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
# torch first and by its exact version: asked for as a range by another package, pip may choose another build.
# Bytecode is left to the first import of what is imported at all.
install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile "$@"; }
install "$(grep '^torch==' constraints.txt)"
install --constraint constraints.txt --editable ".${EXTRAS:-}"
PATH="$PWD/.venv/bin:$PATH"
# Idle threads sleep rather than spin: with anything else on the machine, spinning ones slow each other down many times over.
export OMP_WAIT_POLICY=PASSIVE
