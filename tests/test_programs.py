"""A program that is forked does what one does that imports for itself."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cola_train.programs import start
from tests.helpers.programs import clean_environment

TELLS = """
import multiprocessing, os, signal, sys
print(sys.argv[1:], os.getcwd(), __name__, os.environ["WORD"], multiprocessing.get_start_method())
for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
    print(str(signal.getsignal(signal.Signals[name])).partition(" at ")[0])
print(signal.pthread_sigmask(signal.SIG_BLOCK, []), sys.stdin.read(), flush=True)
print("to stderr, a lone surrogate: \\udc80", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("fresh", [False, True])
def test_it_is_as_if_python_ran_the_module(fresh: bool, tmp_path: Path) -> None:
    (tmp_path / "tells.py").write_text(TELLS)
    environment = {**clean_environment(), "PYTHONPATH": str(tmp_path), "WORD": "given"}
    done = subprocess.run(
        [sys.executable, "-m", "tells", "a", "b c"],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        program = start(
            "tells",
            ["a", "b c"],
            (out.fileno(), err.fileno()),
            environment=environment,
            folder=tmp_path,
            fresh=fresh,
        )
    program.join(60)
    assert program.exitcode == done.returncode == 3
    assert (tmp_path / "out").read_bytes() == done.stdout
    assert (tmp_path / "err").read_bytes() == done.stderr


def test_starting_one_leaves_this_process_signals_as_they_were() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        with Path(os.devnull).open("wb") as nowhere:
            program = start("this", [], (nowhere.fileno(), nowhere.fileno()))
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == blocked
        program.join(60)
        assert program.exitcode == 0
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
