"""`cola-train chaos`: a small copy of a run, once left alone and once disturbed until it finishes;
both must come to the same.
"""

import dataclasses
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from cola_train.config.load import to_yaml
from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError, require
from cola_train.families.registry import family_of
from cola_train.files import write_atomically
from cola_train.operations.audit import audit
from cola_train.operations.faults import Disturbance, corrupt, draw, goes_on_from, inject
from cola_train.operations.sameness import RunOutcome, compare
from cola_train.operations.watched import JobError, ProcessJob, Rhythm, RunMonitor
from cola_train.processes import Processes
from cola_train.training.optim.schedule import Schedule
from cola_train.training.parallel.sharding import check_mesh
from cola_train.training.preflight import refuse

RunT = TypeVar("RunT", bound=RunConfig)
_ROWS = 4
_CHECKPOINTS = 12


def chaos(
    config: RunConfig, kills: int, processes: Sequence[int] | None, steps: int, seed: int
) -> int:
    """Train a small copy of `config` undisturbed and disturbed, compare, and report to stdout. All
    is kept, in one new folder.

    Args:
        config: the run to copy; its data must be there.
        kills: how many disturbances.
        processes: numbers of processes, gone round at each restart of the disturbed run; None stays
            with the config's.
        steps: optimizer steps of each run.
        seed: of kinds and moments of the disturbances.

    Returns:
        The exit status: 0 if the disturbed run came to the same, 1 if not. The same is: every
        sample and every bit; with changing numbers of processes, which add in another order, every
        sample and losses within 1e-4 of each other.

    Raises:
        UserError: numbers that do not fit, no data, or whatever else a training refuses.
    """
    counts = tuple(processes or [config.parallel.num_processes])
    small = shrink(config, counts, steps)
    # After the last disturbance there is a save yet to come, and the run still has steps to do.
    last = steps - small.checkpoint.every_steps - 3
    require(
        1 <= kills <= last,
        f"--kills must be from 1 to {max(last, 1)} in {steps} steps, not {kills}; give more "
        "--steps.",
    )
    refuse(small)
    folder = Path(config.runs_folder) / f"{config.name}-chaos-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True)
    small = dataclasses.replace(small, runs_folder=str(folder))
    write_atomically(folder / "config.yaml", to_yaml(small))
    chance = random.Random(seed)
    runs = _Runs(small, folder, counts)
    _write(
        f"chaos of {config.name}: {kills} disturbances in {steps} steps, seed {seed}; all in "
        f"{folder}"
    )
    _write(
        "a small copy, config.yaml there; beside sizes and schedule it differs in: "
        + _differences(config, small)
    )
    try:
        rhythm = runs.undisturbed()
        runs.disturbed(draw(kills, last, chance), rhythm, chance)
        same = compare(
            RunOutcome.read(folder / "undisturbed"),
            RunOutcome.read(folder / "disturbed"),
            exact=len(set(counts)) == 1,
        )
    except (JobError, UserError) as failure:
        _write(f"FAILED: {failure}\nall in {folder}")
        return 1
    for line in same.lines:
        _write(line)
    _write("audit of the disturbed run")
    clean = audit(folder / "disturbed") == 0
    passed = same.passed and clean
    _write(f"{'PASSED' if passed else 'FAILED'}: {kills} disturbances; all in {folder}")
    return 0 if passed else 1


def shrink(config: RunT, counts: Sequence[int], steps: int) -> RunT:
    """A config of the same stage, objective, strategy, optimizer, data, precision, average and
    guards, small enough for minutes.

    It starts from nothing: networks of other sizes fit no checkpoint. So nothing holds it to a
    first stage, and a VAE that would
    be fixed trains.

    Args:
        config: what to copy.
        counts: the numbers of processes that it must fit.
        steps: optimizer steps; the schedule, checkpoints, validations and intervals are spread over
            them.

    Raises:
        UserError: a strategy that does not fit one of the counts.
    """
    require(
        all(count >= 1 for count in counts),
        f"--processes must be numbers of at least 1, not {list(counts)}.",
    )
    for count in counts:
        check_mesh(config.parallel, Processes(0, count, 0, count))
    trainer, common = config.trainer, math.lcm(*counts)
    accumulates = (
        trainer.global_batch_size > trainer.micro_batch_size * config.parallel.num_processes
    )
    rows = max(-(-_ROWS // common), 2 if accumulates else 1)  # of one process, where there are most
    every = max(1, steps // _CHECKPOINTS)
    schedule = Schedule.of(config)
    warmup = min(schedule.warmup_steps, steps // 10)
    decay = max(warmup + 1, steps)
    anneal = max(1, decay // 5) if schedule.anneal_steps else 0
    changes: dict[str, Any] = {
        "name": "undisturbed",
        "warm_start_from": None,
        "optim": dataclasses.replace(
            config.optim, warmup=str(warmup), decay=str(decay), anneal=str(anneal)
        ),
        "trainer": dataclasses.replace(
            trainer,
            max_steps=steps,
            global_batch_size=rows * common,
            micro_batch_size=rows // 2 if accumulates else rows,
            # Some validations fall on steps that are saved, some do not.
            validate_every_steps=max(1, every * 2 // 3) if trainer.validate_every_steps else 0,
            validation_rows=min(trainer.validation_rows, 2 * rows * common + 1),
            log_every_steps=1,
            sample_every_steps=0,
        ),
        "parallel": dataclasses.replace(
            config.parallel,
            num_processes=counts[0],
            timeout_seconds=min(config.parallel.timeout_seconds, 300),
        ),
        "checkpoint": dataclasses.replace(
            config.checkpoint,
            every_steps=every,
            keep=max(2, config.checkpoint.keep),
            if_damaged="previous",
        ),
        "guard": dataclasses.replace(
            config.guard, spike_window=min(config.guard.spike_window, max(10, steps // 6))
        ),
        "wandb": dataclasses.replace(config.wandb, enabled=False),
        "budget": dataclasses.replace(config.budget, eflops=None, marks=[]),
    }
    return dataclasses.replace(config, **changes, **family_of(config).shrink(config, steps))


def _differences(config: RunConfig, small: RunConfig) -> str:
    kept = ("objective.", "init_", "ema.", "warm_start_from")
    found = [line for line in config.differences(small) if line.startswith(kept)]
    return "; ".join(found) or "nothing"


class _Runs:
    def __init__(self, config: RunConfig, folder: Path, counts: Sequence[int]) -> None:
        self._config, self._folder, self._counts = config, folder, counts

    def undisturbed(self) -> Rhythm:
        """Train to the end; returns how long things take."""
        since = time.monotonic()
        with self._job("undisturbed", "undisturbed.log", self._counts[0]) as job:
            monitor = RunMonitor(job, self._folder / "undisturbed")
            monitor.until(lambda: False)
            self._must_have_finished(job)
        rhythm = monitor.rhythm()
        _write(
            f"undisturbed: {self._counts[0]} processes, {monitor.step} steps in "
            f"{time.monotonic() - since:.0f} s; a step {rhythm.step:.3f} s, a save "
            f"{rhythm.save:.3f} s; SIGTERM has to end it within {rhythm.stop_within:.0f} s"
        )
        return rhythm

    def disturbed(self, plan: Sequence[Disturbance], rhythm: Rhythm, chance: random.Random) -> None:
        """Train, disturbed, until it finishes, with a line for each disturbance once the run has
        gone on.
        """
        _write(
            f"  no.  {'disturbance':14}  {'step':>6}  processes  seconds until it went on  outcome"
        )
        run, begin = self._folder / "disturbed", 0
        since = struck = time.monotonic()
        line: tuple[str, str] | None = None
        for number, disturbance in enumerate([*plan, None], start=1):
            processes = self._counts[(number - 1) % len(self._counts)]
            with self._job("disturbed", f"disturbed-{number:03}.log", processes) as job:
                monitor = RunMonitor(job, run)
                self._must_go_on(job, monitor, begin, processes)
                if line is not None:
                    _write(f"{line[0]}  {time.monotonic() - struck:24.1f}  {line[1]}")
                if disturbance is None:
                    monitor.until(lambda: False)
                    self._must_have_finished(job)
                    break
                outcome = [inject(job, monitor, disturbance, rhythm, chance)]
                struck = time.monotonic()
            if disturbance.corrupt is not None:
                outcome += corrupt(run, disturbance.corrupt, chance)
            begin = goes_on_from(run)
            outcome.append(f"on from step {begin}")
            line = (
                f"{number:5}  {disturbance.kind:14}  {monitor.step:6}  {processes:9}",
                "; ".join(outcome),
            )
        _write(
            f"disturbed: finished after {len(plan)} disturbances in "
            f"{time.monotonic() - since:.0f} s"
        )

    def _job(self, name: str, output: str, processes: int) -> ProcessJob:
        settings = [f"name={name}", f"parallel.num_processes={processes}"]
        return ProcessJob(
            [self._config.stage, str(self._folder / "config.yaml"), *settings],
            self._folder / output,
        )

    def _must_go_on(self, job: ProcessJob, monitor: RunMonitor, begin: int, processes: int) -> None:
        monitor.until(lambda: monitor.step > 0)
        found = monitor.attempt
        if found is None or (found.from_step, found.world_size) != (begin, processes):
            raise job.failure(
                f"it had to go on from step {begin} with {processes} processes, but did not: "
                f"{found}"
            )

    def _must_have_finished(self, job: ProcessJob) -> None:
        if job.ended != 0:
            raise job.failure(f"it ended with exit status {job.ended}")


def _write(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
