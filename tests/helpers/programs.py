"""Running this project's programs as a user would: from an environment that no earlier training of
this process has written to.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import wait
from pathlib import Path

from cola_train.processes import STORE
from cola_train.programs import start

ROOT = Path(__file__).resolve().parents[2]


def clean_environment() -> dict[str, str]:
    """The environment, this interpreter's programs first, without the address of a process group
    that lives in this process.
    """
    launcher = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if name not in (*launcher, STORE)}
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def cola_train(
    *arguments: str, cwd: Path, timeout: float = 300, python_path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the program `cola-train` with these arguments in a process of its own, whose imports are
    done; `python -m cola_train` gives the same and pays for them. Others' packages may lie in
    `python_path`.
    """
    variables = {}
    if python_path is not None:
        paths = [os.environ.get("PYTHONPATH", ""), str(python_path)]
        variables["PYTHONPATH"] = os.pathsep.join(paths)
    return _run("cola_train", arguments, cwd, [variables], timeout)


def as_torchrun(
    processes: int, module: str, *arguments: str, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a module of this repository in processes of one machine, with torchrun's variables. As
    under torchrun the first failure ends all, a little later, and the exit status is then 1.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    number = str(processes)
    job = {"TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    job |= {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    ranks = [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return _run(module, arguments, ROOT, ranks, timeout)


def _run(
    module: str,
    arguments: Sequence[str],
    cwd: Path,
    variables: Sequence[dict[str, str]],
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    """A process for each of `variables`, environment variables that it has beside the usual."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as files:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        out, err = (files.enter_context(path.open("ab")).fileno() for path in outputs)
        programs = [
            start(
                module,
                arguments,
                (out, err),
                environment={**clean_environment(), **more},
                folder=cwd,
            )
            for more in variables
        ]
        running, deadline, failed = programs, time.monotonic() + timeout, False
        while running and time.monotonic() < deadline:
            wait([program.sentinel for program in running], deadline - time.monotonic())
            running = [program for program in running if program.exitcode is None]
            if not failed and any(program.exitcode for program in programs):
                failed, deadline = True, min(deadline, time.monotonic() + 5)
        for program in programs:
            program.kill()
            program.join()
        command = [module, *arguments]
        if running and not failed:
            raise subprocess.TimeoutExpired(command, timeout)
        (first, *others) = (program.exitcode for program in programs)
        assert first is not None
        status = int(failed) if others else first
        return subprocess.CompletedProcess(command, status, *(p.read_text() for p in outputs))
