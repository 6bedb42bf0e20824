"""A program that is forked does what one does that imports for itself."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from cola_train.config.settings import UserError
from cola_train.programs import ENDING, check_temporary_folder, handling, start
from tests.helpers.programs import ROOT, clean_environment

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


def test_what_nohup_keeps_off_stays_off() -> None:
    numbers = [signal.SIGHUP, signal.SIGUSR1]
    before = [signal.getsignal(number) for number in numbers]
    seen: list[int] = []
    try:
        for ignored in (True, False):
            for number in numbers:
                signal.signal(number, signal.SIG_IGN)
            if not ignored:
                signal.signal(signal.SIGHUP, signal.SIG_DFL)
            with handling(ENDING, lambda number, frame: seen.append(number)):
                for number in numbers:
                    signal.raise_signal(number)
            now = signal.getsignal(signal.SIGHUP)
            assert now == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
    assert seen == [signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR1]


TIED = """
import multiprocessing, os, signal, time
from cola_train.programs import signal_at_parents_end
def child():
    signal_at_parents_end(signal.SIGKILL)
    print(os.getpid(), flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
multiprocessing.get_context("fork").Process(target=child).start()
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's end")
def test_a_process_that_is_stopped_ends_with_its_parent() -> None:
    command = [sys.executable, "-c", TIED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))

        def wait_for(*states: str) -> None:
            deadline = time.monotonic() + 30
            while state_of(child) not in states:
                assert time.monotonic() < deadline, state_of(child)
                time.sleep(0.02)

        wait_for(psutil.STATUS_STOPPED)
        parent.kill()
        wait_for(psutil.STATUS_ZOMBIE, "gone")


def state_of(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return "gone"


def test_a_folder_for_temporary_files_where_sockets_have_no_room_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = str(tmp_path).ljust(75, "x")
    monkeypatch.setattr(tempfile, "tempdir", longest)
    check_temporary_folder()
    monkeypatch.setattr(tempfile, "tempdir", longest + "x")
    with pytest.raises(UserError, match=r"76 bytes, .* can use 75, .* set TMPDIR to a folder"):
        start("this", [], (1, 2))


def test_a_name_in_the_longest_folder_for_temporary_files_is_that_of_a_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What Python puts behind the folder is as long as is said.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tempfile.mkdtemp(prefix="pymp-")
    name = tempfile.mktemp(prefix="listener-", dir=folder)
    assert len(name) - len(str(tmp_path)) == 107 - 75
