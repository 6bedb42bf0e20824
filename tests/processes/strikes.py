"""What befalls a run of two processes: one is killed or stopped, or the terminal closes; what must
follow.
"""

import dataclasses
import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cola_train.files import is_unfinished
from cola_train.operations.sameness import RunOutcome, compare
from cola_train.operations.watched import Rhythm, RunMonitor
from cola_train.run_folder import Status, read_status
from cola_train.run_layout import EXPORT
from cola_train.training.checkpoints.folder import saved_steps
from tests.helpers.runs import SMALL
from tests.processes.program import Program, wait_until_none

LAUNCHER, RANK, READER, TERMINAL = "launcher", "rank", "reader", "terminal"
KILL, STOP, CLOSE = "kill", "stop", "close"
DEEDS = [(KILL, LAUNCHER), (KILL, RANK), (KILL, READER)]
DEEDS += [(STOP, LAUNCHER), (STOP, RANK), (STOP, READER), (CLOSE, TERMINAL)]
CONNECTING, FIRST_STEP, STEPS, SAVE, EXPORTS = MOMENTS = [
    "connecting",
    "first step",
    "steps",
    "save",
    "export",
]

LAST_STEP, EVERY = 12, 3
TIMEOUT = 20
"""parallel.timeout_seconds of those that wait for one that was stopped."""
SETTINGS = [
    *SMALL,
    "parallel.num_processes=2",
    "data.num_workers=1",
    "trainer.micro_batch_size=2",
    f"trainer.max_steps={LAST_STEP}",
    "optim.decay=100",
    f"checkpoint.every_steps={EVERY}",
    "trainer.validate_every_steps=6",
]
_SECONDS_TO_GO = 30.0
# After `TIMEOUT`: what the communication waits above it before the loop begins and after it ended
# (processes.py; the watchdog waits less).
_GRACE = 30.0


class Strike(NamedTuple):
    """One of them.

    Attributes:
        fraction: of the time that the moment lasts, or of the next step's or save's.
        step: after which, or the next save after it.
        rank: which is struck, or whose reader.
        real: whether the program is started by itself, not forked from one that is loaded.
    """

    deed: str
    target: str
    moment: str
    step: int
    fraction: float
    rank: int
    real: bool

    def __str__(self) -> str:
        whose = f" {self.rank}" if self.target in (RANK, READER) else ""
        started = "program" if self.real else "forked"
        return f"{self.deed} {self.target}{whose}, {self.moment} (step {self.step}, {started})"


def draw(number: int, seed: int) -> list[Strike]:
    """`number` strikes, each deed at each moment as often as any other, by chance otherwise."""
    chance = random.Random(seed)
    # Readers are started for the first step, and end with the last.
    pairs = [
        (deed, moment)
        for deed, moment in itertools.product(DEEDS, MOMENTS)
        if deed[1] != READER or moment not in (CONNECTING, EXPORTS)
    ]
    chance.shuffle(pairs)
    strikes = []
    for index in range(number):
        (deed, target), moment = pairs[index % len(pairs)]
        step = chance.randrange(2, LAST_STEP - EVERY)
        rank = chance.randrange(2)
        fraction = chance.random()
        strikes.append(Strike(deed, target, moment, step, fraction, rank, index % 3 == 0))
    return strikes


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """A run that nothing befell: what it came to, and the seconds that its parts took."""

    outcome: RunOutcome
    exported: dict[str, bytes]
    rhythm: Rhythm
    connecting: float
    first_step: float


def begin(
    rows: Path, folder: Path, *more: str, real: bool = False, terminal: bool = False
) -> Program:
    """Start the command, the same each time but for `more` settings."""
    arguments = ["vae", *SETTINGS, f"data.path={rows}", "name=run", *more]
    return Program(arguments, folder, "run", real=real, terminal=terminal)


def undisturbed(rows: Path, folder: Path) -> Undisturbed:
    """Train the run to its end, in a folder of its own."""
    with begin(rows, folder) as program:
        monitor = RunMonitor(program, program.run_folder)  # type: ignore[arg-type]
        _until(program, monitor, lambda: bool(program.ranks()))
        met = time.monotonic()
        _until(program, monitor, lambda: monitor.attempt is not None)
        begun = time.monotonic()
        _until(program, monitor, lambda: monitor.step > 0)
        done = time.monotonic()
        monitor.until(lambda: False)
        if program.ended != 0:
            raise program.failure(f"it ended with exit status {program.ended}")
        wait_until_none(program, _SECONDS_TO_GO)
    run = program.run_folder
    times = begun - met, done - begun
    return Undisturbed(RunOutcome.read(run), _exported(run), monitor.rhythm(), *times)


def strike(case: Strike, rows: Path, folder: Path, usual: Undisturbed) -> str:
    """Do it to a run in a new folder, and run the same command again; returns what happened.

    Raises:
        JobError: a process stays, the status is not true, or the end is another.
    """
    folder.mkdir(parents=True)
    terminal, waits = case.deed == CLOSE, case.deed == STOP and case.target != LAUNCHER
    more = [f"parallel.timeout_seconds={TIMEOUT}"] if waits else []
    with begin(rows, folder, *more, real=case.real, terminal=terminal) as program:
        monitor = RunMonitor(program, program.run_folder)  # type: ignore[arg-type]
        _wait_for(case, program, monitor, usual)
        running = program.ended is None
        if not running and program.ended != 0:
            raise program.failure(f"{case}: it ended with {program.ended} before it was struck")
        step = _strike(case, program, monitor)
        seconds = _SECONDS_TO_GO
        if waits:
            seconds += TIMEOUT + _GRACE
        if case.deed == STOP and case.target == LAUNCHER:
            # The run goes on without it.
            seconds = 300.0
        if (case.deed, case.target, case.moment) == (STOP, LAUNCHER, CONNECTING):
            # What it has not started yet cannot wake it.
            time.sleep(3)
            program.launcher.send_signal(signal.SIGCONT)
        took = wait_until_none(program, seconds)
        if list(program.temporary.glob("cola-train*")):
            raise program.failure(f"{case}: left in {program.temporary}")
        monitor.until(lambda: True)
        found = read_status(program.run_folder)
        problem = _untrue(case, program.run_folder, found, monitor.step) if running else None
        if problem is not None:
            raise program.failure(f"{case}: {problem}; {found}")
        if "Traceback (most recent call last)" in program.said():
            raise program.failure(f"{case}: it ended with a traceback")
        told = f"{found.state} {found.step}" if found is not None else "not begun"
        if found is not None and found.reason:
            told += f" ({found.reason[:90]})"
        when = "after" if running else "TOO LATE, after"
        line = f"{case}: {when} step {step}; gone after {took:.1f} s, exit {program.ended}, {told}"
    with begin(rows, folder, *more) as again:
        RunMonitor(again, again.run_folder).until(lambda: False)  # type: ignore[arg-type]
        if again.ended != 0:
            raise again.failure(f"{case}: the same command again: exit {again.ended}")
        wait_until_none(again, _SECONDS_TO_GO)
    run = again.run_folder
    found = read_status(run)
    if found != Status("finished", LAST_STEP):
        raise again.failure(f"{case}: at the end {found}")
    same = compare(usual.outcome, RunOutcome.read(run), exact=True)
    if not same.passed or _exported(run) != usual.exported:
        raise again.failure("\n".join([f"{case}: another end", *same.lines]))
    left = [path for path in run.rglob("*") if is_unfinished(path)]
    if left:
        raise again.failure(f"{case}: left behind: {left}")
    return line


def _wait_for(case: Strike, program: Program, monitor: RunMonitor, usual: Undisturbed) -> None:
    """Wait for the moment; the run may have ended by then."""
    seconds = 0.0
    if case.moment == CONNECTING:
        if case.target == LAUNCHER and case.step % 2:
            # while it starts them
            seconds = 0.5 * usual.connecting
        else:
            monitor.until(lambda: len(program.ranks()) > case.rank)
            seconds = usual.connecting
    elif case.moment == FIRST_STEP:
        monitor.until(lambda: monitor.attempt is not None)
        seconds = usual.first_step
    elif case.moment == STEPS:
        monitor.until(lambda: monitor.step >= case.step)
        seconds = usual.rhythm.step
    elif case.moment == SAVE:
        monitor.until(lambda: monitor.step >= case.step and monitor.saving() is not None)
        seconds = 0.8 * usual.rhythm.save
    else:
        monitor.until(lambda: _is_exporting(program.run_folder))
    until = time.monotonic() + case.fraction * seconds
    while time.monotonic() < until:
        program.read_terminal()
        time.sleep(0.001)


def _strike(case: Strike, program: Program, monitor: RunMonitor) -> int:
    number = signal.SIGKILL if case.deed == KILL else signal.SIGSTOP
    if case.target == TERMINAL:
        program.close_terminal()
    elif case.target == LAUNCHER:
        program.launcher.send_signal(number)
    else:
        ranks = program.ranks
        monitor.until(lambda: len(ranks()) > case.rank)
        process = ranks()[case.rank]
        if case.target == READER:
            monitor.until(lambda: bool(process.children()))
            (process,) = process.children()
        process.send_signal(number)
    return monitor.step


def _untrue(case: Strike, run: Path, found: Status | None, step: int) -> str | None:
    """What is not true in a run's status after a strike that found it running; None if all is."""
    if found is None:
        early = case.moment == CONNECTING
        return None if early and not saved_steps(run) else "no status"
    if found.state == "running":
        return "it is not running"
    if found.state == "finished":
        late = case.moment in (EXPORTS, SAVE, STEPS) or (case.deed, case.target) == (STOP, LAUNCHER)
        return None if late and (run / EXPORT).is_dir() else "it did not finish"
    if case.deed == CLOSE or case.target == LAUNCHER:
        # asked to stop, all were there to save
        if found.state != "interrupted" or (
            found.step != step or found.step not in saved_steps(run)
        ):
            return f"step {step} had to be saved, saved are {saved_steps(run)}"
        return None
    if found.state != "failed" or not found.reason:
        return "no reason"
    return None if found.step == step else f"it had done {step} steps"


def _is_exporting(run: Path) -> bool:
    try:
        return any(name.startswith(f".{EXPORT}.") for name in os.listdir(run))  # noqa: PTH208  # many times a second
    except FileNotFoundError:
        return False


def _until(program: Program, monitor: RunMonitor, reached: Callable[[], bool]) -> None:
    if not monitor.until(reached):
        raise program.failure(f"it ended early, with exit status {program.ended}")


def _exported(run: Path) -> dict[str, bytes]:
    folder = run / EXPORT
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
