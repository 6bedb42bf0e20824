"""Where a run's figures go: metrics.jsonl always, a progress bar, wandb when asked, and a plot."""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from tqdm import tqdm

from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError
from cola_train.console import say
from cola_train.devices import device_peak
from cola_train.files import JsonlWriter, write_atomically
from cola_train.run_layout import EVALUATION_PLOT, LOSSES_PLOT, METRICS, SUMMARY
from cola_train.training.callbacks.pace import Pace, summarize_cost
from cola_train.training.callbacks.plots import draw_evaluations, draw_losses
from cola_train.training.loop.budget import eflops
from cola_train.training.loop.module import StageModule
from cola_train.training.loop.state import RunState

_SECONDS_BETWEEN_PICTURES = 60.0


class Metrics(pl.Callback):
    """Writes metrics.jsonl, every log_every_steps and after each evaluation; redraws its pictures
    now and then, and at the end.

    Only process 0 writes. Every line has `step` (optimizer steps done) and `seconds` (since this
    process started training). What a run that was killed had done beyond its last checkpoint is
    done and logged again: of a step's lines the last one counts.
    """

    def __init__(
        self, config: RunConfig, run_folder: Path, is_first: bool, loggers: Sequence[Any]
    ) -> None:
        self.config, self.run_folder, self.is_first, self.loggers = (
            config,
            run_folder,
            is_first,
            loggers,
        )
        self.lines = JsonlWriter(run_folder / METRICS)
        self.started = self.last_drawn = self.last_ended = time.monotonic()
        self.pace = Pace(self.started, RunState(), 1, None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clocks."""
        assert isinstance(pl_module, StageModule)
        peak = (
            device_peak(pl_module.processes.device, self.config.trainer.precision)
            if self.is_first
            else None
        )
        self.started = self.last_ended = time.monotonic()
        self.pace = Pace(self.started, RunState(), pl_module.processes.world_size, peak).since(
            self.started, pl_module.state
        )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the step that was just taken."""
        assert isinstance(pl_module, StageModule)
        state, now = pl_module.state, time.monotonic()
        state.seconds += now - self.last_ended
        state.device_seconds += (now - self.last_ended) * pl_module.processes.world_size
        self.last_ended = now
        if state.step % self.config.trainer.log_every_steps and not pl_module.is_done:
            return
        figures = {f"train/{name}": value for name, value in pl_module.last_metrics.items()}
        spent = {f"eflops_{convention}": value for convention, value in eflops(state).items()}
        rates = self.pace.rates(now, state, pl_module.budget.last_step)
        self.pace = self.pace.since(now, state)
        self._write({"step": state.step, **figures, "tokens": state.tokens, **spent, **rates})

    def log_evaluation(self, step: int, figures: Mapping[str, float], began: float) -> None:
        """Log what was measured on a step's weights, by whole names; measuring `began` at that
        reading of the clock.
        """
        self._write({"step": step, **figures})
        # All processes wait for the picture.
        if time.monotonic() - self.last_drawn > _SECONDS_BETWEEN_PICTURES:
            self._draw()
        # It is not training time.
        self.pace = dataclasses.replace(
            self.pace, paused=self.pace.paused + time.monotonic() - began
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last picture, unless the run was asked to stop: then there may be little time."""
        assert isinstance(pl_module, StageModule)
        if not pl_module.stop_requested:
            self._draw()
        if self.is_first:
            summary = summarize_cost(pl_module.state, self.pace.peak)
            with contextlib.suppress(UserError):  # a disk that refuses it is not worth a run
                write_atomically(self.run_folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
        for logger in self.loggers:
            logger.experiment.finish()  # wandb's: what it has not written yet

    def _draw(self) -> None:
        if not self.is_first:
            return
        self.last_drawn = time.monotonic()
        try:
            draw_losses(self.lines.path, self.run_folder / LOSSES_PLOT)
            if self.config.in_loop_eval.is_on:
                draw_evaluations(
                    self.lines.path,
                    self.run_folder / EVALUATION_PLOT,
                    self.config.in_loop_eval.evaluators,
                )
        except (UserError, OSError) as error:  # no picture is worth a run
            say(f"cola-train: warning: the pictures in {self.run_folder} were not drawn: {error}")

    def _write(self, row: Mapping[str, float]) -> None:
        if not self.is_first:
            return
        row = {**row, "seconds": round(time.monotonic() - self.started, 3)}
        # JSON knows no NaN: what is not a number is null.
        self.lines.append(
            {name: value if math.isfinite(value) else None for name, value in row.items()}
        )
        for logger in self.loggers:
            logger.log_metrics(
                {name: value for name, value in row.items() if name != "step"},
                step=int(row["step"]),
            )


class Progress(pl.Callback):
    """A bar over optimizer steps with rate, time left and the latest loss; plain lines where there
    is no terminal.
    """

    def __init__(self, is_first: bool) -> None:
        self.is_first = is_first
        self.bar: tqdm[Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        assert isinstance(pl_module, StageModule)
        if self.is_first:
            interval = 0.5 if sys.stderr.isatty() else 30.0
            self.bar = tqdm(
                total=pl_module.budget.last_step,
                initial=pl_module.state.step,
                desc="training",
                unit="step",
                mininterval=interval,
                maxinterval=interval,
            )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Move on by one step."""
        assert isinstance(pl_module, StageModule)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{pl_module.last_metrics['loss']:.4f}", refresh=False)
            self.bar.update(1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


def wandb_loggers(config: RunConfig, run_folder: Path) -> list[Any]:
    """The wandb logger where it is on. Offline unless `wandb.online`: files only, for `wandb
    sync`.
    """
    if not config.wandb.enabled:
        return []
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise UserError(
            "wandb.enabled needs the package: pip install 'cola-train[wandb]', or set "
            "wandb.enabled=false."
        ) from error
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(
        name=config.name,
        save_dir=run_folder,
        project=config.wandb.project,
        offline=not config.wandb.online,
        log_model=False,
    )
    return [logger]
