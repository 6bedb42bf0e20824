"""What `cola-train chaos` does to a run: processes that it ends and files that it damages."""

import contextlib
import os
import random
import time
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from cola_train.config.settings import INTERRUPTED, UserError
from cola_train.operations.watched import Rhythm, RunMonitor, TrainingProcesses
from cola_train.run_folder import read_status
from cola_train.training.checkpoints.folder import intact_manifest, saved_steps, step_folder

Kind = Literal["kill in a save", "SIGTERM", "kill"]
Corruption = Literal["one bit flipped", "truncated", "deleted"]

_KINDS: tuple[Kind, ...] = get_args(Kind)
_CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)


class Disturbance(NamedTuple):
    """One thing to be done to the run."""

    kind: Kind
    step: int  # when this step has been done
    fraction: float  # then after this share of a step's duration, or of the next save's
    corrupt: Corruption | None  # to the latest checkpoint, after a kill


def draw(number: int, last_step: int, chance: random.Random) -> list[Disturbance]:
    """`number` disturbances, a third of each kind, spread evenly over steps 1 to `last_step`."""
    kinds = [_KINDS[index % len(_KINDS)] for index in range(number)]
    chance.shuffle(kinds)
    drawn = []
    for index, kind in enumerate(kinds):
        step = 1 + int((index + chance.random()) * last_step / number)
        corrupts = kind != "SIGTERM" and chance.random() < 0.5
        corrupt = chance.choice(_CORRUPTIONS) if corrupts else None
        # A save may take less time than those that were measured.
        fraction = chance.uniform(0, 0.8 if kind == "kill in a save" else 1.0)
        drawn.append(Disturbance(kind, min(step, last_step), fraction, corrupt))
    return drawn


def inject(
    job: TrainingProcesses,
    monitor: RunMonitor,
    disturbance: Disturbance,
    rhythm: Rhythm,
    chance: random.Random,
) -> str:
    """Wait for the moment, disturb the run, and check how it ends; returns what happened.

    Raises:
        JobError: the run ended before that moment, or not as it has to.
    """
    saves = disturbance.kind == "kill in a save"
    reached = monitor.until(
        lambda: monitor.step >= disturbance.step and (not saves or monitor.saving() is not None)
    )
    if not reached:
        raise job.failure(f"the run ended at step {monitor.step}, before it could be disturbed")
    saving = monitor.saving()
    time.sleep(disturbance.fraction * (rhythm.save if saves else rhythm.step))
    if disturbance.kind != "SIGTERM":
        number = job.kill()
        monitor.until(lambda: True)
        if (left := monitor.saving()) is not None:
            return f"{number} processes killed in the save of step {left}"
        just = f" as step {saving} had just been saved" if saves else ""
        return f"{number} processes killed{just}"
    asked, target = time.monotonic(), job.terminate_one(chance)
    status = job.wait(rhythm.stop_within)
    seconds = time.monotonic() - asked
    monitor.until(lambda: True)
    found = read_status(monitor.run_folder)
    saved = found is not None and (found.state, found.step) == ("interrupted", monitor.step)
    if found is None or not saved or status != INTERRUPTED:
        raise job.failure(
            f"after SIGTERM to {target} it ended with exit status {status}, {found}; its last step "
            f"is {monitor.step}"
        )
    return f"{target}; saved step {found.step} and ended after {seconds:.1f} s"


def corrupt(run_folder: Path, how: Corruption, chance: random.Random) -> list[str]:
    """Damage a file of the newest checkpoint, if an older one is intact; returns what was done."""
    steps = saved_steps(run_folder)
    if not any(step < steps[-1] for step in intact_steps(run_folder)):
        return []
    path = chance.choice(sorted(step_folder(run_folder, steps[-1]).iterdir()))
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        os.truncate(path, chance.randrange(path.stat().st_size))
    else:
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    return [f"{path.parent.name}/{path.name} {how}"]


def resumes_from(run_folder: Path) -> int:
    """The step that a run has to resume from: its newest intact checkpoint's, or 0."""
    return max(intact_steps(run_folder), default=0)


def intact_steps(run_folder: Path) -> list[int]:
    """The steps whose checkpoints are whole, ascending."""
    found = []
    for step in saved_steps(run_folder):
        with contextlib.suppress(UserError):
            intact_manifest(step_folder(run_folder, step))
            found.append(step)
    return found
