"""One change and one command, in a process of their own with bounded memory and time."""

import contextlib
import dataclasses
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.mutations.subjects import Subject

MOST_BYTES = 2 << 30
MOST_SECONDS = 60
_MOST_WAIT = 300  # of the clock: other programs may be at work too
_ERROR = "cola-train: error:"


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: the exit status; minus the signal's number where one ended it.
        result: what `Subject.result` read; None unless the status is 0.
        done: what `Asked.done` read.
        peak: bytes of memory at most, beyond what the process began with.
        seconds: less those in which other programs had the CPU.
    """

    status: int
    out: str
    err: str
    result: Any
    done: Any
    peak: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Trial:
    """A subject's file, what becomes of it, and the seed of that."""

    subject: Subject
    file: str
    change: str
    seed: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.subject.name} [{self.file}: {self.change}, seed {self.seed}]"


def attempt(trial: Trial | Subject, base: Path, folder: Path) -> tuple[Ended, Any]:
    """Run a command on a copy of what it needs, changed; also what the changed file asks for."""
    subject = trial.subject if isinstance(trial, Trial) else trial
    shutil.rmtree(folder, ignore_errors=True)
    for name in (*subject.needs, *subject.files):
        source, target = base / name, folder / name
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)
    with contextlib.chdir(folder):
        for name in subject.without:
            Path(name).unlink(missing_ok=True)
        if isinstance(trial, Trial):
            subject.changes[trial.change](Path(trial.file), random.Random(trial.seed))
        return run(subject), _asked(subject)


def _asked(subject: Subject) -> Any:
    """What the file asks for; None where another reader cannot read it."""
    path = Path(subject.files[0])
    if subject.asked is None or not path.is_file() or path.stat().st_size > 1 << 25:
        return None
    try:
        return subject.asked.read(path.read_bytes().decode("utf-8-sig"))
    except Exception:  # whatever another reader has against it
        return None


def run(subject: Subject) -> Ended:
    """Run the command in the current folder, in a fork of this process, whose imports are done."""
    began, before = time.monotonic(), _memory()
    child = os.fork()
    if child == 0:
        _be(subject, before)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    waited = int(Path(f"/proc/{child}/schedstat").read_text().split()[1]) / 1e9
    seconds = time.monotonic() - began - waited
    _, status, usage = os.wait4(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it may have left
    found = json.loads(Path(".found").read_text()) if Path(".found").exists() else [None, None]
    return Ended(
        os.waitstatus_to_exitcode(status),
        *(Path(name).read_text(errors="replace") for name in (".out", ".err")),
        *found,
        peak=1024 * usage.ru_maxrss - before,
        seconds=seconds,
    )


def _memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _be(subject: Subject, before: int) -> None:
    """The child: limits, then the program, then the result."""
    os.setsid()
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for kind, most in (
        (resource.RLIMIT_AS, addresses + MOST_BYTES),
        (resource.RLIMIT_FSIZE, 1 << 30),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    signal.setitimer(signal.ITIMER_REAL, _MOST_WAIT)
    for name, number in ((".out", 1), (".err", 2)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "utf-8", "replace")
        for number in (1, 2)
    )
    warnings.resetwarnings()
    status: Any = 1
    try:
        sys.argv = ["cola-train", *subject.arguments]
        from cola_train.cli import run as program

        try:
            program()
        except SystemExit as end:
            status = end.code
        if status == 0:
            done = None if subject.asked is None else subject.asked.done()
            Path(".found").write_text(json.dumps([subject.result(), done]))
    except BaseException:
        traceback.print_exc()
        status = 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


REFUSED, SAME, ASKED = "refused", "same result", "as asked"


def judge(trial: Trial, ended: Ended, asked: Any, plain: tuple[Ended, Any]) -> tuple[str, str]:
    """Which of the outcomes that are right it is, or "" ; and what is wrong."""
    unchanged, asked_before = plain
    errors = [line for line in ended.err.splitlines() if line.startswith(_ERROR)]
    if "Traceback (most recent call last)" in ended.err + ended.out:
        return "", "a traceback"
    if ended.status < 0:
        return "", f"ended by {signal.Signals(-ended.status).name}"
    if ended.peak > MOST_BYTES or "not enough memory" in ended.err:
        return "", f"{ended.peak >> 20} MiB of memory"
    if ended.seconds > MOST_SECONDS:
        return "", f"{ended.seconds:.0f} s"
    if ended.status == 2:
        return (REFUSED, "") if len(errors) == 1 else ("", f"{len(errors)} lines of errors")
    if ended.status == 1 and trial.subject.arguments[0] == "audit":
        return REFUSED, ""
    if ended.status != 0:
        return "", f"status {ended.status}"
    if errors:
        return "", "an error and status 0"
    same = ended.result == unchanged.result
    if trial.subject.prints:
        same = same and ended.out == unchanged.out
    if same:
        return SAME, ""
    if trial.subject.asked is None or asked == asked_before:
        return "", "another result"
    if ended.done is not None and not _is_part(asked, ended.done):
        return "", f"not what was asked: {asked!r:.300}, done: {ended.done!r:.300}"
    return ASKED, ""


def _is_part(asked: Any, done: Any) -> bool:
    if isinstance(asked, dict) and isinstance(done, dict):
        return all(done.get(name) == value for name, value in asked.items())
    return bool(asked == done)


def every(subjects: tuple[Subject, ...], change: str) -> Iterator[Trial]:
    """Each file of each subject with each change whose name has this."""
    for subject in subjects:
        for file in subject.files:
            for name in subject.changes:
                if change in name:
                    yield Trial(subject, file, name, 0)


def trials(subjects: tuple[Subject, ...], count: int, seed: int) -> Iterator[Trial]:
    """`count` of them, drawn with `seed`; each subject's changes in a new order."""
    draw = random.Random(seed)
    decks: dict[Subject, list[str]] = {}
    order: list[Subject] = []
    for _ in range(count):
        if not order:
            order = draw.sample(subjects, len(subjects))
        subject = order.pop()
        if not decks.get(subject):
            decks[subject] = draw.sample(sorted(subject.changes), len(subject.changes))
        yield Trial(
            subject, draw.choice(subject.files), decks[subject].pop(), draw.randrange(2**32)
        )
