# Sourced by the other scripts: makes .venv and installs the project with the extras in EXTRAS (none by default), from nothing; what
# is installed already is left alone. PYTHON chooses the interpreter (3.11 or newer).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Bytecode is written by the first import of what is imported at all; without any, every program would compile torch again.
unset PYTHONDONTWRITEBYTECODE
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile "$@"; }
installed=.venv/installed-$(cat pyproject.toml constraints.txt | cksum | tr -d ' ')
if [ ! -e "$installed${EXTRAS:-}" ]; then
    # torch first and by its exact version: asked for as a range by another package, pip may choose another build.
    install "$(grep '^torch==' constraints.txt)"
    install --constraint constraints.txt --editable ".${EXTRAS:-}"
    touch "$installed" "$installed${EXTRAS:-}"
fi
PATH="$PWD/.venv/bin:$PATH"
# Idle threads sleep rather than spin: with anything else on the machine, spinning ones slow each other down many times over.
export OMP_WAIT_POLICY=PASSIVE
