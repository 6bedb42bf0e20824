"""Start the processes of a run on this machine by torchrun's own code, and say how they ended."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from cola_train.config.settings import INTERRUPTED
from cola_train.operations.report import last_lines

# Forwarded to every process: they save at an agreed step and end; after this time torchrun kills.
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
_SECONDS_TO_SAVE = 300


def launch(arguments: Sequence[str], num_processes: int, log_folder: Path) -> int:
    """Run `cola-train ARGUMENTS` in `num_processes` processes.

    Process 0 writes to this terminal, the others into `log_folder`; the end of the log of one that
    failed is shown.

    Returns:
        The exit status of the process that failed first, or 0. After a signal 128 + its number, as
        a shell does, whether or not the processes could save: status.json says.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(_SECONDS_TO_SAVE)
    # torchrun's own messages repeat what is said here.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    redirected = ",".join(f"{rank}:3" for rank in range(1, num_processes))
    options = [
        "--standalone",
        f"--nproc-per-node={num_processes}",
        f"--signals-to-handle={_SIGNALS}",
        f"--log-dir={log_folder}",
        f"--redirects={redirected}",
    ]
    try:
        torchrun.run(torchrun.parse_args([*options, "--module", "cola_train", *arguments]))
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
    if logs and (lines := last_lines(logs[-1])):
        heading = f"cola-train: process {rank} failed first; the end of {logs[-1]}:"
        sys.stderr.write("\n".join([heading, *lines, ""]))
