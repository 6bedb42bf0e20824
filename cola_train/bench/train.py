"""`cola-train bench train`, in the measuring process: the training loop's own optimizer steps on
random tokens.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch

from cola_train.bench.config import BenchTrainConfig
from cola_train.bench.machine import Clock, Memory
from cola_train.bench.parts import parts_of, top_operations
from cola_train.bench.report import Speedometer, speed, spread, used, utilization
from cola_train.bench.workloads import random_batch, randomize
from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError, require
from cola_train.console import progress_bar
from cola_train.data.batch import Batch
from cola_train.families.costs import network_parameters, step_flops
from cola_train.families.registry import family_of
from cola_train.processes import connected
from cola_train.training.loop.interrupts import StopRequest
from cola_train.training.loop.lightning import build_trainer
from cola_train.training.loop.module import StageModule
from cola_train.training.loop.watchdog import Watchdog
from cola_train.training.parallel.sharding import gather_each_once
from cola_train.training.preflight import with_precision


def measure_train(config: BenchTrainConfig, run: RunConfig) -> dict[str, Any]:
    """Measure a run's step in this process.

    Steps are those of the training loop (training/loop/module.py), with the same Trainer and
    sharding, on one process. First
    whole ones are timed; parts, and the profile, are of steps after these, since watching takes
    time.

    Returns:
        What `cola-train bench train` reports, see docs/benchmarks.md.

    Raises:
        UserError: a GPU is asked for and there is none, or its memory is too small.
    """
    require(
        run.trainer.accelerator != "gpu" or torch.cuda.is_available(),
        "trainer.accelerator=gpu, but torch sees no GPU here; use cpu or auto, or see `cola-train "
        "doctor`.",
    )
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    with connected(run.trainer.accelerator, run.parallel.timeout_seconds) as processes:
        run = with_precision(run, None)
        stage = StageModule(
            run, processes, StopRequest(), Watchdog(0, run.parallel.timeout_seconds)
        )
        measure = _Measure(config, Clock(processes.device, config.threads))
        try:
            build_trainer(run, processes, [measure]).fit(
                stage, train_dataloaders=_Repeated(random_batch(run))
            )
        except torch.OutOfMemoryError:
            raise UserError(
                f"The GPU has too little memory for {run.trainer.micro_batch_size} rows of "
                f"{run.data.seq_len} tokens: give fewer rows, or "
                "parallel.activation_checkpointing=full."
            ) from None
        assert stage.state.skipped_steps == 0, (
            "steps were skipped: what was timed is not a whole step"
        )
        return measure.result(run)


class _Repeated:
    """One batch, again and again."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self._batch


class _Measure(pl.Callback):
    """Times steps from outside: warm-ups, steps that count, steps taken apart, one under the
    profiler.
    """

    def __init__(self, config: BenchTrainConfig, clock: Clock) -> None:
        self._config, self._clock, self._speedometer = config, clock, Speedometer(clock)
        self._seconds: list[float] = []
        self._parts: list[dict[str, float]] = []
        self._top: list[dict[str, Any]] | None = None
        self._memory: Memory | None = None
        self._used: dict[str, int] = {}
        self._step, self._begin = 0, 0.0
        self._counted = config.warmups + config.runs
        self._taken_apart = self._counted + max(2, config.runs // 2)
        self._last = self._taken_apart + config.profile
        self._watching = contextlib.ExitStack()
        self._bar = progress_bar("measuring", "step", self._last)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Random weights."""
        assert isinstance(pl_module, StageModule)
        randomize(pl_module.objective)
        gather_each_once(pl_module.objective)
        pl_module.ema.start()
        self._speedometer.read()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any
    ) -> None:
        """The last moment before a step."""
        assert isinstance(pl_module, StageModule)
        if self._memory is None:
            self._memory = Memory(self._clock.device)
        if self._step >= self._taken_apart:
            self._top = self._watching.enter_context(top_operations(self._clock.device))
        elif self._step >= self._counted:
            self._parts.append(self._watching.enter_context(parts_of(pl_module, self._clock)))
        self._begin = self._clock.read()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any
    ) -> None:
        """The first moment after it."""
        seconds = self._clock.read() - self._begin
        self._watching.close()
        if self._config.warmups <= self._step < self._counted:
            self._seconds.append(seconds)
        self._step += 1
        if self._step == self._counted:
            assert self._memory is not None
            self._used = used(self._memory)
            self._speedometer.read()
        self._bar.update(1)
        if self._step == self._last:
            self._bar.close()
            trainer.should_stop = True

    def result(self, run: RunConfig) -> dict[str, Any]:
        """What was measured of this run's steps."""
        trainer, precision = run.trainer, run.trainer.precision
        seconds = spread(self._seconds)
        median = seconds["median"]
        tokens = trainer.global_batch_size * run.data.seq_len
        parts = {
            name: sum(step[name] for step in self._parts) / len(self._parts)
            for name in self._parts[0]
        }
        return {
            "workload": self._config.workload,
            "rows": trainer.micro_batch_size,
            "micro_batches": trainer.global_batch_size // trainer.micro_batch_size,
            "seq_len": run.data.seq_len,
            "tokens": tokens,
            "parameters": network_parameters(run),
            "backbone_parameters": family_of(run).backbone_parameters(run),
            "precision": precision,
            "activation_checkpointing": run.parallel.activation_checkpointing,
            "machine": self._speedometer.report(),
            "seconds": seconds,
            **speed(tokens, median, self._speedometer, precision),
            **utilization(step_flops(run, 0), median, self._clock, self._speedometer, precision),
            "memory": self._used,
            "parts": {
                name: {"seconds": value, "share": value / sum(parts.values())}
                for name, value in parts.items()
            },
            "top_operations": self._top,
        }
