"""Start the processes of a run on this machine, through torchrun's own machinery, and say how they
ended.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from cola_train.config.settings import INTERRUPTED

# Forwarded to every process, which save at an agreed step and end; torchrun kills what has not
# ended after this long.
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
_SECONDS_TO_SAVE = 300
_TAIL_LINES = 30


def launch(arguments: Sequence[str], num_processes: int, log_folder: Path) -> int:
    """Run `cola-train ARGUMENTS` in `num_processes` processes; returns the first failing one's exit
    status, or 0.

    Ended by a signal it returns 128 + its number, as a shell does, whether or not the processes
    came to save: status.json says.

    Process 0 writes to this terminal, the others into `log_folder`; the end of the log of one that
    failed is shown.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(_SECONDS_TO_SAVE)
    # torchrun's own remarks repeat what is said here.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    redirected = ",".join(f"{rank}:3" for rank in range(1, num_processes))
    options = torchrun.parse_args(
        [
            "--standalone",
            f"--nproc-per-node={num_processes}",
            f"--signals-to-handle={_SIGNALS}",
            f"--log-dir={log_folder}",
            f"--redirects={redirected}",
            "--module",
            "cola_train",
            *arguments,
        ]
    )
    try:
        torchrun.run(options)
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=lambda item: item[1].timestamp)
        if failure.exitcode == INTERRUPTED:
            return INTERRUPTED
        _show_log(log_folder, rank)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        sys.stderr.write(f"cola-train: {error.sigval.name} was passed on to all processes\n")
        return 128 + error.sigval
    return 0


def _show_log(log_folder: Path, rank: int) -> None:
    logs = sorted(log_folder.rglob(f"{rank}/stderr.log"), key=lambda path: path.stat().st_mtime)
    lines = logs[-1].read_text(encoding="utf-8", errors="replace").splitlines() if logs else []
    if lines:
        sys.stderr.write(
            f"cola-train: process {rank} failed first; the end of {logs[-1]}:\n"
            + "\n".join(lines[-_TAIL_LINES:])
            + "\n"
        )
