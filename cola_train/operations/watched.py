"""A training as a user starts it, with all its processes, watched from outside by its files."""

import contextlib
import itertools
import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from cola_train.config.content import open_file
from cola_train.devices import uses_gpu
from cola_train.json_text import parse_json
from cola_train.operations.report import last_lines
from cola_train.processes import STORE
from cola_train.programs import start
from cola_train.run_layout import CHECKPOINTS, LOGS, RANKS, STEP_LOG
from cola_train.training.loop.step_log import Attempt

_LOOK_SECONDS = 0.002
_QUIET_SECONDS = 600.0
_DEATH_SECONDS = 30.0


class JobError(Exception):
    """A training did not do what it had to; the message ends with its output's last lines."""


class Rhythm(NamedTuple):
    """The seconds that a run takes for a step, and for a save."""

    step: float
    save: float

    @property
    def stop_within(self) -> float:
        """The seconds that a run may take to stop when asked to."""
        return 60 + 5 * (self.step + self.save)


class TrainingProcesses(contextlib.AbstractContextManager["TrainingProcesses"]):
    """`cola-train ARGUMENTS` with all its processes; a context manager that leaves none behind."""

    def __init__(self, arguments: Sequence[str], run_folder: Path, output: Path) -> None:
        """Start it in a session of its own; its output goes to the file `output`."""
        self._run_folder, self._output = run_folder, output
        with output.open("wb") as file:
            self._process = start(
                "cola_train",
                arguments,
                (file.fileno(), file.fileno()),
                environment=_clean_environment(),
                first=os.setsid,
                fresh=uses_gpu("auto"),
            )
        assert self._process.pid is not None
        self._launcher = psutil.Process(self._process.pid)

    def __exit__(self, *rest: object) -> None:
        self.kill()

    @property
    def ended(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.exitcode

    def kill(self) -> int:
        """Send SIGKILL to every process, workers first; returns their number, once all are gone."""
        trainers = [*self._ranks(), self._launcher]
        readers: list[psutil.Process] = []
        for process in trainers:
            with contextlib.suppress(psutil.NoSuchProcess):
                readers += process.children(recursive=True)
        processes = list(itertools.filterfalse(_is_gone, [*readers, *trainers]))
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        deadline = time.monotonic() + _DEATH_SECONDS
        while left := [process.pid for process in processes if not _is_gone(process)]:
            if time.monotonic() > deadline:
                raise self.failure(f"processes {left} survive SIGKILL")
            time.sleep(_LOOK_SECONDS)
        self._process.join()
        return len(processes)

    def terminate_one(self, chance: random.Random) -> str:
        """Send SIGTERM to one of the processes that train, or to their launcher; returns which."""
        targets = {f"rank {rank}": process for rank, process in enumerate(self._ranks())}
        targets["the launcher" if targets else "the process"] = self._launcher
        name = chance.choice(sorted(targets))
        targets[name].send_signal(signal.SIGTERM)
        return name

    def wait(self, seconds: float) -> int:
        """The exit status, once it has ended.

        Raises:
            JobError: it runs for longer than that.
        """
        self._process.join(seconds)
        if self.ended is None:
            raise self.failure(f"it still runs after {seconds:.0f} s")
        return self.ended

    def _ranks(self) -> list[psutil.Process]:
        """The processes that it started, if it started any; those that are gone may be missing."""
        found = []
        for path in self._run_folder.glob(f"{LOGS}/*-{self._process.pid}/{RANKS}"):
            for number in parse_json(path.read_text()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.append(psutil.Process(number))
        return found

    def failure(self, what: str) -> JobError:
        """An error that shows the end of the output."""
        lines = [f"  {line}" for line in last_lines(self._output)]
        return JobError("\n".join([f"{what}; the end of {self._output}:", *lines]))


class RunMonitor:
    """What can be seen of a training that has just been started, from its run's folder.

    Attributes:
        attempt: its own line in steps.jsonl, once it is there.
        step: the last step that it has done; 0 before its first.
    """

    def __init__(self, job: TrainingProcesses, run_folder: Path) -> None:
        self._job, self.run_folder, self._log = job, run_folder, run_folder / STEP_LOG
        self._read = self._log.stat().st_size if self._log.exists() else 0
        self.attempt: Attempt | None = None
        self.step = 0
        self._step_times: list[float] = []
        self._save_seconds: list[float] = []
        self._saving_since: float | None = None

    def until(self, reached: Callable[[], bool]) -> bool:
        """Look until `reached()`; False if the training ends before.

        Raises:
            JobError: no step has been done for ten minutes.
        """
        moved = time.monotonic()
        while True:
            ended = self._job.ended is not None
            if self._look():
                moved = time.monotonic()
            if reached() or ended:
                return reached()
            if time.monotonic() - moved > _QUIET_SECONDS:
                raise self._job.failure(f"no step has been done for {_QUIET_SECONDS:.0f} s")
            time.sleep(_LOOK_SECONDS)

    def saving(self) -> int | None:
        """The step that is being saved, if any."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.run_folder / CHECKPOINTS):  # noqa: PTH208  # many times a second
                if name.startswith(".saving-"):
                    return int(name.rpartition("-")[2])
        return None

    def rhythm(self) -> Rhythm:
        """Medians of what was seen."""
        steps = [after - before for before, after in itertools.pairwise(self._step_times)]
        return Rhythm(*(statistics.median(seen or [0.0]) for seen in (steps, self._save_seconds)))

    def _look(self) -> bool:
        now, saving = time.monotonic(), self.saving() is not None
        if saving and self._saving_since is None:
            self._saving_since = now
        elif not saving and self._saving_since is not None:
            self._save_seconds.append(now - self._saving_since)
            self._saving_since = None
        if not self._log.exists() or self._log.stat().st_size == self._read:
            return False
        with open_file(self._log) as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole + newline)
        for line in whole.decode(errors="replace").split("\n"):
            try:
                values = parse_json(line)
            except ValueError:
                continue  # the end of a line that an earlier process could not finish
            if "attempt" in values:
                self.attempt = Attempt(**values["attempt"])
            elif "step" in values:
                self.step = values["step"]
                self._step_times.append(now)
        return bool(whole)


def _is_gone(process: psutil.Process) -> bool:
    # A zombie stays in the table until its parent waits for it, but holds nothing.
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _clean_environment() -> dict[str, str]:
    """This process' environment without its place in a group of torchrun's processes."""
    names = {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "RANK", "WORLD_SIZE"}
    names |= {"LOCAL_RANK", "LOCAL_WORLD_SIZE", STORE}
    prefixes = ("TORCHELASTIC_", "GROUP_", "ROLE_")
    return {
        name: value
        for name, value in os.environ.items()
        if name not in names and not name.startswith(prefixes)
    }
