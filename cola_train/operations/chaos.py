"""`cola-train chaos`: a small copy of a run, undisturbed and disturbed, must end alike."""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from cola_train.config.load import to_yaml
from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError, require
from cola_train.families.registry import family_of
from cola_train.files import write_atomically
from cola_train.operations.audit import audit
from cola_train.operations.faults import Disturbance, corrupt, draw, inject, resumes_from
from cola_train.operations.report import report
from cola_train.operations.sameness import RunOutcome, compare
from cola_train.operations.watched import JobError, Rhythm, RunMonitor, TrainingProcesses
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
    """Train a small copy of `config` undisturbed and disturbed, compare, and report to stdout.

    Everything is kept, in one new folder. There are `kills` disturbances, of kinds and at moments
    drawn by `seed`; `processes` are for the restarts of the disturbed run, in turn, None for the
    config's. Each run takes `steps` optimizer steps.

    Returns:
        The exit status: 0 if the disturbed run ended alike, 1 if not. Alike means every sample and
        every bit; with changing numbers of processes, which add in another order, every sample and
        losses within 1e-4 of each other.

    Raises:
        UserError: numbers that do not fit, no data, or whatever else a training refuses.
    """
    counts = tuple(processes or [config.parallel.num_processes])
    small = shrink(config, counts, steps)
    # After the last disturbance there is still a save to come, and steps to do.
    last = steps - small.checkpoint.every_steps - 3
    require(
        1 <= kills <= last,
        f"--kills must be from 1 to {max(last, 1)} in {steps} steps, not {kills}; give more "
        "--steps.",
    )
    refuse(small)
    folder = Path(config.runs_folder) / f"{config.name}-chaos-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True)
    small = replace(small, runs_folder=str(folder))
    write_atomically(folder / "config.yaml", to_yaml(small))
    chance = random.Random(seed)
    runs = _Runs(small, folder, counts)
    report(
        f"chaos of {config.name}: {kills} disturbances in {steps} steps, seed {seed}; all in "
        f"{folder}"
    )
    kept = ("objective.", "init_", "ema.", "warm_start_from")
    differences = [line for line in config.differences(small) if line.startswith(kept)]
    report(
        "a small copy, config.yaml there; beside sizes and schedule it differs in: "
        + ("; ".join(differences) or "nothing")
    )
    try:
        rhythm = runs.undisturbed()
        runs.disturbed(draw(kills, last, chance), rhythm, chance)
        outcomes = [RunOutcome.read(folder / name) for name in ("undisturbed", "disturbed")]
        same = compare(*outcomes, exact=len(set(counts)) == 1)
    except (JobError, UserError) as failure:
        report(f"FAILED: {failure}\nall in {folder}")
        return 1
    report("\n".join([*same.lines, "audit of the disturbed run"]))
    clean = audit(folder / "disturbed") == 0
    passed = same.passed and clean
    report(f"{'PASSED' if passed else 'FAILED'}: {kills} disturbances; all in {folder}")
    return 0 if passed else 1


def shrink(config: RunT, counts: Sequence[int], steps: int) -> RunT:
    """A config that trains in minutes, of the same stage, objective, strategy, optimizer and data.

    Precision, average and guards are the same, too. It starts from nothing: networks of other sizes
    fit no checkpoint. So nothing holds it to a first stage, and a VAE that would be fixed trains.
    It fits each of `counts` processes; schedule, checkpoints and validations are spread over
    `steps` optimizer steps.

    Raises:
        UserError: a strategy that does not fit one of the counts.
    """
    require(
        all(count >= 1 for count in counts),
        f"--processes must be numbers of at least 1, not {list(counts)}.",
    )
    for count in counts:
        check_mesh(config.parallel, Processes(0, count, 0, count))
    trainer, parallel, common = config.trainer, config.parallel, math.lcm(*counts)
    accumulates = trainer.global_batch_size > trainer.micro_batch_size * parallel.num_processes
    rows = max(-(-_ROWS // common), 2 if accumulates else 1)  # of one process, where there are most
    every = max(1, steps // _CHECKPOINTS)
    schedule = Schedule.of(config)
    warmup = min(schedule.warmup_steps, steps // 10)
    decay = max(warmup + 1, steps)
    anneal = max(1, decay // 5) if schedule.anneal_steps else 0
    spike_window = min(config.guard.spike_window, max(10, steps // 6))
    return replace(
        config,
        name="undisturbed",
        warm_start_from=None,
        optim=replace(config.optim, warmup=str(warmup), decay=str(decay), anneal=str(anneal)),
        trainer=replace(
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
        parallel=replace(
            parallel, num_processes=counts[0], timeout_seconds=min(parallel.timeout_seconds, 300)
        ),
        checkpoint=replace(
            config.checkpoint,
            every_steps=every,
            keep=max(2, config.checkpoint.keep),
            if_damaged="previous",
        ),
        guard=replace(config.guard, spike_window=spike_window),
        wandb=replace(config.wandb, enabled=False),
        budget=replace(config.budget, eflops=None, marks=[]),
        **family_of(config).shrink(config, steps),
    )


class _Runs:
    """The undisturbed and the disturbed training, in `folder`."""

    def __init__(self, config: RunConfig, folder: Path, counts: Sequence[int]) -> None:
        self._config, self._folder, self._counts = config, folder, counts

    def undisturbed(self) -> Rhythm:
        """Train to the end; returns how long a step and a save take."""
        since = time.monotonic()
        with self._job("undisturbed", "undisturbed.log", self._counts[0]) as job:
            monitor = RunMonitor(job, self._folder / "undisturbed")
            monitor.until(lambda: False)
            self._must_have_finished(job)
        rhythm = monitor.rhythm()
        report(
            f"undisturbed: {self._counts[0]} processes, {monitor.step} steps in "
            f"{time.monotonic() - since:.0f} s; a step {rhythm.step:.3f} s, a save "
            f"{rhythm.save:.3f} s; SIGTERM has to end it within {rhythm.stop_within:.0f} s"
        )
        return rhythm

    def disturbed(self, plan: Sequence[Disturbance], rhythm: Rhythm, chance: random.Random) -> None:
        """Train, disturbed, until it finishes; a disturbance's line follows when it has resumed."""
        report("  no.  disturbance       step  processes  seconds until it went on  outcome")
        run, begin = self._folder / "disturbed", 0
        since = struck = time.monotonic()
        line: tuple[str, str] | None = None
        for number, disturbance in enumerate([*plan, None], start=1):
            processes = self._counts[(number - 1) % len(self._counts)]
            with self._job("disturbed", f"disturbed-{number:03}.log", processes) as job:
                monitor = RunMonitor(job, run)
                self._must_resume(job, monitor, begin, processes)
                if line is not None:
                    report(f"{line[0]}  {time.monotonic() - struck:24.1f}  {line[1]}")
                if disturbance is None:
                    monitor.until(lambda: False)
                    self._must_have_finished(job)
                    break
                outcome = [inject(job, monitor, disturbance, rhythm, chance)]
                struck = time.monotonic()
            if disturbance.corrupt is not None:
                outcome += corrupt(run, disturbance.corrupt, chance)
            begin = resumes_from(run)
            outcome.append(f"on from step {begin}")
            what = f"{number:5}  {disturbance.kind:14}  {monitor.step:6}  {processes:9}"
            line = what, "; ".join(outcome)
        report(
            f"disturbed: finished after {len(plan)} disturbances in "
            f"{time.monotonic() - since:.0f} s"
        )

    def _job(self, name: str, output: str, processes: int) -> TrainingProcesses:
        arguments = [self._config.stage, str(self._folder / "config.yaml")]
        arguments += [f"name={name}", f"parallel.num_processes={processes}"]
        return TrainingProcesses(arguments, self._folder / name, self._folder / output)

    def _must_resume(
        self, job: TrainingProcesses, monitor: RunMonitor, begin: int, processes: int
    ) -> None:
        monitor.until(lambda: monitor.step > 0)
        found = monitor.attempt
        if found is None or (found.from_step, found.world_size) != (begin, processes):
            raise job.failure(
                f"it had to go on from step {begin} with {processes} processes, but did not: "
                f"{found}"
            )

    def _must_have_finished(self, job: TrainingProcesses) -> None:
        if job.ended != 0:
            raise job.failure(f"it ended with exit status {job.ended}")
