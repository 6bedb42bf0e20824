"""What `cola-train chaos` does to a run: which process it ends how and when, and what it
damages.
"""

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cola_train.config.settings import INTERRUPTED, UserError
from cola_train.operations.watched import ProcessJob, Rhythm, RunMonitor
from cola_train.run_folder import read_status
from cola_train.training.checkpoints.folder import intact_manifest, saved_steps, step_folder

Kind = Literal["kill", "kill in a save", "SIGTERM"]
Corruption = Literal["one bit flipped", "truncated", "deleted"]

_KINDS: tuple[Kind, ...] = ("kill in a save", "SIGTERM", "kill")
_CORRUPTIONS: tuple[Corruption, ...] = ("one bit flipped", "truncated", "deleted")


@dataclass(frozen=True)
class Disturbance:
    """One thing to be done to the run."""

    kind: Kind
    step: int  # when this step has been done
    fraction: float  # and this share of another step's, or of the next save's, duration is over
    corrupt: Corruption | None  # to the latest checkpoint, after a kill


def draw(number: int, last_step: int, chance: random.Random) -> list[Disturbance]:
    """`number` disturbances, one in each of as many equal parts of steps 1 to `last_step`; a third
    of each kind.
    """
    kinds = [_KINDS[index % len(_KINDS)] for index in range(number)]
    chance.shuffle(kinds)
    drawn = []
    for index, kind in enumerate(kinds):
        step = 1 + int((index + chance.random()) * last_step / number)
        corrupt = (
            chance.choice(_CORRUPTIONS) if kind != "SIGTERM" and chance.random() < 0.5 else None
        )
        # A save may take less long than those that were measured.
        fraction = chance.uniform(0, 0.8 if kind == "kill in a save" else 1.0)
        drawn.append(Disturbance(kind, min(step, last_step), fraction, corrupt))
    return drawn


def inject(
    job: ProcessJob,
    monitor: RunMonitor,
    disturbance: Disturbance,
    rhythm: Rhythm,
    chance: random.Random,
) -> str:
    """Wait for the moment, do it, and check that it ended as it has to; returns what happened.

    Raises:
        JobError: the run ended before that moment, or not as it has to.
    """
    saves = disturbance.kind == "kill in a save"
    if not monitor.until(
        lambda: monitor.step >= disturbance.step and (not saves or monitor.saving() is not None)
    ):
        raise job.failure(f"the run ended at step {monitor.step}, before it could be disturbed")
    saving = monitor.saving()
    time.sleep(disturbance.fraction * (rhythm.save if saves else rhythm.step))
    if disturbance.kind != "SIGTERM":
        number = job.kill()
        monitor.until(lambda: True)
        left = monitor.saving()
        when = (
            f"in the save of step {left}"
            if left is not None
            else f"as step {saving} had just been saved"
            if saves
            else ""
        )
        return f"{number} processes killed {when}".rstrip()
    asked, target = time.monotonic(), job.terminate_one(chance)
    status = job.wait(rhythm.stop_within)
    seconds = time.monotonic() - asked
    monitor.until(lambda: True)
    found = read_status(monitor.run_folder)
    if (
        status != INTERRUPTED
        or found is None
        or (found.state, found.step) != ("interrupted", monitor.step)
    ):
        raise job.failure(
            f"after SIGTERM to {target} it ended with exit status {status}, {found}; its last step "
            f"is {monitor.step}"
        )
    return f"{target}; saved step {found.step} and ended after {seconds:.1f} s"


def corrupt(run_folder: Path, how: Corruption, chance: random.Random) -> list[str]:
    """Damage one file of the newest checkpoint, if an older one is intact; returns what was done,
    if anything.
    """
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


def goes_on_from(run_folder: Path) -> int:
    """The step that a run has to go on from: its newest intact checkpoint's; 0 without."""
    return max(intact_steps(run_folder), default=0)


def intact_steps(run_folder: Path) -> list[int]:
    """The steps whose checkpoints are whole, ascending."""
    found = []
    for step in saved_steps(run_folder):
        try:
            intact_manifest(step_folder(run_folder, step))
        except UserError:
            continue
        found.append(step)
    return found
