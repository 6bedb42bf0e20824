"""scripts/setup.sh, with an interpreter that only notes what it is asked for."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _set_up(project: Path, extras: str = "") -> list[str]:
    """What is installed, in a process that was told not to write bytecode."""
    notes = project / "notes"
    notes.write_text("")
    done = subprocess.run(
        ["bash", "-c", 'set -euo pipefail; source scripts/setup.sh; env; echo "$PATH"'],
        cwd=project,
        env={**os.environ, "EXTRAS": extras, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "PYTHONDONTWRITEBYTECODE" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"{project}/.venv/bin:")
    return notes.read_text().splitlines()


def test_what_is_installed_is_installed_again_only_when_its_list_or_the_extras_change(
    tmp_path: Path,
) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\n[ ! -e failing ] || exit 1\necho "${@: -1}" >>notes\n')
    python.chmod(0o755)
    torch = next(
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("torch==")
    )
    # One that fails is not taken for done.
    (tmp_path / "failing").touch()
    try:
        _set_up(tmp_path)
    except subprocess.CalledProcessError:
        (tmp_path / "failing").unlink()
    assert _set_up(tmp_path) == [torch, "."]
    assert _set_up(tmp_path) == []
    assert _set_up(tmp_path, "[dev]") == [torch, ".[dev]"]
    assert _set_up(tmp_path, "[dev]") == _set_up(tmp_path) == []
    with (tmp_path / "constraints.txt").open("a") as constraints:
        constraints.write("another==1\n")
    assert _set_up(tmp_path, "[dev]") == [torch, ".[dev]"]
    # Whoever has the extras has the rest.
    assert _set_up(tmp_path) == []
