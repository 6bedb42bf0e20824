"""Running this project's programs as a user would: from an environment that no earlier training of
this process has written to.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Imports take a training longer than these tests' few steps do. A process that has done them, and
# nothing else, forks one for each program.
_PROGRAMS = multiprocessing.get_context("forkserver")
_PROGRAMS.set_forkserver_preload(
    ["cola_train.cli", "cola_train.training.run", "lightning.pytorch", "tests.helpers.programs"]
)


def clean_environment() -> dict[str, str]:
    """The environment, this interpreter's programs first, without the address of a process group
    that lives in this process.
    """
    launcher = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def torchrun(
    processes: int, module: str, *arguments: str, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a module of this repository in processes of one machine."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    return subprocess.run(
        [*command, "--module", module, *arguments],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def cola_train(
    *arguments: str, cwd: Path, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run the program `cola-train` with these arguments in a process of its own, whose imports are
    done; `python -m cola_train` gives the same and pays for them.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        process = _PROGRAMS.Process(
            target=_run_program, args=(arguments, cwd, clean_environment(), out, err)
        )
        process.start()
        try:
            process.join(timeout)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(["cola-train", *arguments], timeout)
        finally:
            process.kill()
            process.join()
        return subprocess.CompletedProcess(
            ["cola-train", *arguments],
            process.exitcode,
            out.read_text(encoding="utf-8"),
            err.read_text(encoding="utf-8"),
        )


def _run_program(
    arguments: tuple[str, ...], cwd: Path, environment: dict[str, str], out: Path, err: Path
) -> None:
    """What a process of `cola_train` does: exits as the program does, its output in files."""
    from cola_train.cli import run

    for stream, path in ((1, out), (2, err)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream)
    # As files the streams are buffered in blocks, as those of a program are that writes to a pipe.
    for name, stream in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, os.fdopen(stream, "w", encoding="utf-8"))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["cola-train", *arguments]
    run()
