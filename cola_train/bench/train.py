"""`cola-train bench train`, in the measuring process: training steps on random tokens."""

import contextlib
import itertools
import statistics
from typing import Any

import lightning.pytorch as pl
import torch

from cola_train.bench.config import BenchTrainConfig
from cola_train.bench.machine import Clock, Memory
from cola_train.bench.parts import parts_of, top_operations
from cola_train.bench.report import Speedometer, spread
from cola_train.bench.workloads import random_batch, randomize
from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError, require
from cola_train.console import progress_bar
from cola_train.families.costs import network_parameters, step_flops
from cola_train.families.registry import family_of
from cola_train.processes import connected
from cola_train.training.loop.interrupts import StopRequest
from cola_train.training.loop.lightning import build_trainer
from cola_train.training.loop.module import StageModule
from cola_train.training.parallel.sharding import gather_each_once
from cola_train.training.preflight import with_precision


def measure_train(config: BenchTrainConfig, run: RunConfig) -> dict[str, Any]:
    """Measure a run's step in this process.

    Steps are those of the training loop (training/loop/module.py), with the same Trainer and
    sharding, on one process. First whole ones are timed; parts, and the profile, are of steps after
    these, since watching takes time.

    Returns:
        What `cola-train bench train` reports, see docs/benchmarks.md.

    Raises:
        UserError: a GPU is asked for and there is none, or its memory is too small.
    """
    trainer = run.trainer
    require(
        trainer.accelerator != "gpu" or torch.cuda.is_available(),
        "trainer.accelerator=gpu, but torch sees no GPU here; use cpu or auto, or see `cola-train "
        "doctor`.",
    )
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    with connected(trainer.accelerator, run.parallel.timeout_seconds) as processes:
        run = with_precision(run, None)
        stage = StageModule(run, processes, StopRequest())
        measure = _Measure(config, Clock(processes.device, config.threads))
        batches = itertools.repeat(random_batch(run))
        try:
            build_trainer(run, processes, [measure]).fit(stage, train_dataloaders=batches)
        except torch.OutOfMemoryError:
            raise UserError(
                f"The GPU has too little memory for {trainer.micro_batch_size} rows of "
                f"{run.data.seq_len} tokens: give fewer rows, or "
                "parallel.activation_checkpointing=full."
            ) from None
        skipped = stage.state.skipped_steps
        assert skipped == 0, "steps were skipped: what was timed is not a whole step"
        return measure.result(run)


class _Measure(pl.Callback):
    """Times steps from outside: warm-ups, counted runs, steps taken apart, one profiled."""

    def __init__(self, config: BenchTrainConfig, clock: Clock) -> None:
        self._config, self._clock, self._speedometer = config, clock, Speedometer(clock)
        self._seconds: list[float] = []  # of every step
        self._parts: list[dict[str, float]] = []
        self._top: list[dict[str, Any]] | None = None
        self._memory: Memory | None = None
        self._used: dict[str, int] = {}
        self._begin = 0.0
        self._counted = config.warmups + config.runs
        self._taken_apart = self._counted + max(2, config.runs // 2)
        self._last = self._taken_apart + config.profile
        self._watching = contextlib.ExitStack()
        self._bar = progress_bar("measuring", "step", self._last)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, StageModule)
        randomize(pl_module.objective)
        gather_each_once(pl_module.objective)
        pl_module.ema.start()
        self._speedometer.read()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any
    ) -> None:
        assert isinstance(pl_module, StageModule)
        if self._memory is None:
            self._memory = Memory(self._clock.device)
        step = len(self._seconds)
        if step >= self._taken_apart:
            self._top = self._watching.enter_context(top_operations(self._clock.device))
        elif step >= self._counted:
            self._parts.append(self._watching.enter_context(parts_of(pl_module, self._clock)))
        self._begin = self._clock.read()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any
    ) -> None:
        self._seconds.append(self._clock.read() - self._begin)
        self._watching.close()
        if len(self._seconds) == self._counted:
            assert self._memory is not None
            self._used = self._memory.used()
            self._speedometer.read()
        self._bar.update(1)
        if len(self._seconds) == self._last:
            self._bar.close()
            trainer.should_stop = True

    def result(self, run: RunConfig) -> dict[str, Any]:
        """The measurements of this run's steps."""
        trainer, precision = run.trainer, run.trainer.precision
        seconds = spread(self._seconds[self._config.warmups : self._counted])
        tokens = trainer.global_batch_size * run.data.seq_len
        parts = {
            name: statistics.fmean(step[name] for step in self._parts) for name in self._parts[0]
        }
        whole = sum(parts.values())
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
            **self._speedometer.rates(tokens, step_flops(run, 0), seconds["median"], precision),
            "memory": self._used,
            "parts": {
                name: {"seconds": value, "share": value / whole} for name, value in parts.items()
            },
            "top_operations": self._top,
        }
