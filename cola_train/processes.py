"""The processes of a run: who they are, how they connect, and how they come to one decision."""

import contextlib
import dataclasses
import datetime
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from cola_train.config.settings import INTERRUPTED, UserError, require
from cola_train.devices import uses_gpu

T = TypeVar("T")
STORE = "COLA_TRAIN_STORE"
"""The variable with the file in which processes of one machine meet (operations/launch.py)."""

_LOST = re.compile(
    r"connection (closed|reset|refused)|gloo|nccl|timed out|wait timeout|broken pipe", re.IGNORECASE
)
# The watchdog (training/loop/watchdog.py) speaks first: it can say what its process was doing.
_GRACE_SECONDS = 30
_SECONDS_TO_NOTICE = 5  # for torch, or a thread, to say that others are missing


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those of the run, one a device."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    def agree(self, decide: Callable[[], T]) -> T:
        """What process 0 decides, or its UserError, on all processes; a collective call."""
        outcome: list[tuple[T | None, str | None]] = [(None, None)]
        if self.is_first:
            try:
                outcome = [(decide(), None)]
            except UserError as error:
                outcome = [(None, str(error))]
        dist.broadcast_object_list(outcome, src=0)
        result, problem = outcome[0]
        if problem is not None:
            raise UserError(problem)
        return cast(T, result)  # T may itself be None

    def barrier(self) -> None:
        """Wait until all are here."""
        dist.barrier()


def is_one_of_several() -> bool:
    """Whether torchrun, or a run's own launcher, started this process among others."""
    return dist.is_torchelastic_launched() or STORE in os.environ


def launched_rank() -> int:
    """This process' number before it is connected; 0 where it was started alone."""
    return int(os.environ["RANK"]) if is_one_of_several() else 0


@contextlib.contextmanager
def connected(accelerator: str, timeout_seconds: int) -> Iterator[Processes]:
    """torch.distributed's default group while the block runs: all launched, or this process."""
    timeout = datetime.timedelta(seconds=timeout_seconds + _GRACE_SECONDS)
    rank, world_size, local_rank, local_world_size = 0, 1, 0, 1
    if is_one_of_several():
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, world_size, local_rank, local_world_size = (int(os.environ[n]) for n in names)
    device, backend = torch.device("cpu"), "gloo"
    if uses_gpu(accelerator):
        available = torch.cuda.device_count()
        require(
            local_rank < available,
            f"Process {local_rank} of this machine has no GPU: there are {available}. Start at "
            "most as many.",
        )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # Gloo beside NCCL: checkpoints written in the background and offloaded weights communicate
        # from host memory.
        backend = "cpu:gloo,cuda:nccl"
    if is_one_of_several():
        if not dist.is_initialized():  # by an earlier run of these processes
            longest = timeout.total_seconds() + _SECONDS_TO_NOTICE
            with _loss_explained(rank), _ended_after(longest, rank):
                meeting: dict[str, Any] = {}  # torchrun's, where its variables say
                if STORE in os.environ:
                    store = dist.FileStore(os.environ[STORE], world_size)  # type: ignore[attr-defined]  # documented
                    meeting = {"store": store, "rank": rank, "world_size": world_size}
                dist.init_process_group(backend, timeout=timeout, **meeting)
    else:
        # A store in memory: it opens no port, leaves no address in the environment, and nothing on
        # disk if the process is killed.
        alone = dist.HashStore()  # type: ignore[attr-defined]  # documented; exported where the system is not Windows
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)
    try:
        with _loss_explained(rank):
            yield Processes(rank, world_size, local_rank, local_world_size, device)
    finally:
        # Of several processes each ends by `end_process`: tearing gloo down aborts one time in ten.
        if not is_one_of_several():
            dist.destroy_process_group()


def lost_process(error: BaseException) -> str | None:
    """What communication says where another process has gone; None for any other error."""
    text = str(error).strip()
    return text.splitlines()[0] if _LOST.search(text) else None


@contextlib.contextmanager
def _loss_explained(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        lost = lost_process(error)
        if lost is None:
            raise
        raise UserError(
            f"Rank {rank} has not met another process of the run, or lost it: {lost}. The other "
            "ranks' messages say which ended first and why; the same command again goes on from "
            "the last checkpoint."
        ) from error


@contextlib.contextmanager
def _ended_after(seconds: float, rank: int) -> Iterator[None]:
    """End this process if the block takes longer.

    A process that was stopped may hold the lock of the file where all meet, and for a lock torch
    waits without end; while it makes its store it lets no other thread say so, and the system ends
    the process.
    """

    def end() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        with contextlib.suppress(OSError):
            sys.stderr.write(
                f"cola-train: error: Rank {rank} has waited {seconds:.0f} s to meet the other "
                "processes of the run: one of them may be stopped. The same command again goes on "
                "from the last checkpoint.\n"
            )
        end_process(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    signal.setitimer(signal.ITIMER_REAL, seconds + _SECONDS_TO_NOTICE)
    try:
        yield
    finally:
        timer.cancel()
        signal.setitimer(signal.ITIMER_REAL, 0)


def local_part(tensor: Tensor) -> Tensor:
    """This process' part of a sharded tensor; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def end_process(status: int) -> NoReturn:
    """End a process that was launched among others, with its exit status."""
    if status not in (0, INTERRUPTED) and launched_rank():
        # At the first failure all are ended: process 0, which fails alike, must have said why
        # by then.
        time.sleep(2)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a console that is gone
            stream.flush()
    launcher = multiprocessing.parent_process()
    if STORE in os.environ and launcher is not None and launcher.pid is not None:
        # Where the launcher was stopped (Ctrl-Z), it has to see that this process has ended; and so
        # has the one that forked it.
        for number in {launcher.pid, os.getppid()} - {1}:
            with contextlib.suppress(OSError):
                os.kill(number, signal.SIGCONT)
    os._exit(status)
