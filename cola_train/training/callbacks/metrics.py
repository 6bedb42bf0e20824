"""Where a run's metrics go: metrics.jsonl always, plots, a progress bar, and wandb if asked."""

import copy
import dataclasses
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cola_train.config.run import RunConfig
from cola_train.config.settings import require
from cola_train.console import only_warned
from cola_train.devices import device_peak
from cola_train.json_lines import JsonlWriter
from cola_train.run_layout import EVALUATION_PLOT, LOSSES_PLOT, METRICS
from cola_train.training.callbacks.pace import Pace, write_summary
from cola_train.training.callbacks.plots import draw_evaluations, draw_losses
from cola_train.training.loop.budget import eflops
from cola_train.training.loop.module import StageCallback, StageModule

_SECONDS_BETWEEN_PLOTS = 60.0


class Metrics(StageCallback):
    """Writes metrics.jsonl every log_every_steps and after each evaluation; redraws plots at times.

    Only process 0 writes. Every line has `step` (optimizer steps done) and `seconds` (since this
    process started training). What a killed run had done beyond its last checkpoint is done and
    logged again: of a step's lines the last one counts.
    """

    pace: Pace

    def __init__(self, config: RunConfig, run_folder: Path, is_first: bool) -> None:
        self.config, self.run_folder, self.is_first = config, run_folder, is_first
        self.loggers = _wandb_loggers(config, run_folder) if is_first else []
        self.lines = JsonlWriter(run_folder / METRICS)
        self.started = self.last_drawn = self.last_ended = time.monotonic()
        self.cpu_at_last_end = time.process_time()

    def before_steps(self, stage: StageModule) -> None:
        device, precision = stage.processes.device, self.config.trainer.precision
        peak = device_peak(device, precision) if self.is_first else None
        self.started = self.last_ended = time.monotonic()
        self.cpu_at_last_end = time.process_time()
        state = copy.deepcopy(stage.state)
        self.pace = Pace(self.started, state, stage.processes.world_size, peak)

    def after_step(self, stage: StageModule) -> None:
        state, now, cpu = stage.state, time.monotonic(), time.process_time()
        state.seconds += now - self.last_ended
        state.device_seconds += (now - self.last_ended) * stage.processes.world_size
        state.cpu_seconds += (cpu - self.cpu_at_last_end) * stage.processes.world_size
        self.last_ended, self.cpu_at_last_end = now, cpu
        if state.step % self.config.trainer.log_every_steps and not stage.is_done:
            return
        metrics = {f"train/{name}": value for name, value in stage.last_metrics.items()}
        spent = {f"eflops_{convention}": value for convention, value in eflops(state).items()}
        rates = self.pace.rates(now, state, stage.budget.last_step)
        self.pace = self.pace.since(now, state)
        self._write({"step": state.step, **metrics, "tokens": state.tokens, **spent, **rates})

    def log_evaluation(self, step: int, metrics: Mapping[str, float], began: float) -> None:
        """Log what was measured of a step's weights, as `validation.Report` says."""
        self._write({"step": step, **metrics})
        # All processes wait for the plot.
        if time.monotonic() - self.last_drawn > _SECONDS_BETWEEN_PLOTS:
            self._draw()
        # Evaluation is not training time.
        paused = self.pace.paused + time.monotonic() - began
        self.pace = dataclasses.replace(self.pace, paused=paused)

    def after_steps(self, stage: StageModule) -> None:
        # Where the run was asked to stop, there may be little time.
        if not stage.stop_requested:
            self._draw()
        if self.is_first:
            write_summary(self.run_folder, stage.state, self.pace.peak)
        # wandb's: what it has not written yet
        self._to_loggers(lambda logger: logger.experiment.finish())

    def _draw(self) -> None:
        if not self.is_first:
            return
        self.last_drawn = time.monotonic()
        evaluation = self.config.in_loop_eval
        with only_warned(f"the pictures in {self.run_folder} were not drawn"):
            draw_losses(self.lines.path, self.run_folder / LOSSES_PLOT)
            if evaluation.is_on:
                plot = self.run_folder / EVALUATION_PLOT
                draw_evaluations(self.lines.path, plot, evaluation.evaluators)

    def _write(self, row: Mapping[str, float]) -> None:
        if not self.is_first:
            return
        row = {**row, "seconds": round(time.monotonic() - self.started, 3)}
        # JSON knows no NaN: what is not a number is null.
        self.lines.append(
            {name: value if math.isfinite(value) else None for name, value in row.items()}
        )
        values = {name: value for name, value in row.items() if name != "step"}
        self._to_loggers(lambda logger: logger.log_metrics(values, step=int(row["step"])))

    def _to_loggers(self, act: Callable[[Any], object]) -> None:
        """Hand something on; a logger that fails (no network, no account) is given up."""
        kept = []
        for logger in self.loggers:
            with only_warned("wandb gets nothing more of this run"):
                act(logger)
                kept.append(logger)
        self.loggers = kept


class Progress(StageCallback):
    """A bar over steps with rate, time left and the latest loss; plain lines without a terminal."""

    bar: "tqdm[Any] | None" = None  # on process 0, once there are steps

    def before_steps(self, stage: StageModule) -> None:
        if stage.processes.is_first:
            interval = 0.5 if sys.stderr.isatty() else 30.0
            self.bar = tqdm(
                total=stage.budget.last_step,
                initial=stage.state.step,
                desc="training",
                unit="step",
                mininterval=interval,
                maxinterval=interval,
            )

    def after_step(self, stage: StageModule) -> None:
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{stage.last_metrics['loss']:.4f}", refresh=False)
            self.bar.update(1)

    def after_steps(self, stage: StageModule | None = None) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, *_: Any) -> None:
        self.after_steps()


def _wandb_loggers(config: RunConfig, run_folder: Path) -> list[Any]:
    """The wandb logger where it is on; offline (files for `wandb sync`) unless `wandb.online`."""
    if not config.wandb.enabled:
        return []
    require(
        importlib.util.find_spec("wandb") is not None,
        "wandb.enabled needs the package: pip install 'cola-train[wandb]', or set "
        "wandb.enabled=false.",
    )
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(
        name=config.name,
        save_dir=run_folder,
        project=config.wandb.project,
        offline=not config.wandb.online,
        log_model=False,
    )
    return [logger]
