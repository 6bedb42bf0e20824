"""Where a run's figures go: metrics.jsonl always, a progress bar, wandb when asked, and a plot."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from tqdm import tqdm

from cola_train.config.runs import RunConfig
from cola_train.config.settings import UserError
from cola_train.data.progress import say
from cola_train.files import Lines
from cola_train.training.module import StageModule
from cola_train.training.plot import draw_losses

METRICS = "metrics.jsonl"
_SECONDS_BETWEEN_PICTURES = 60.0


class Metrics(pl.Callback):
    """Writes a line of metrics.jsonl every log_every_steps and at each validation; redraws losses.png now and then, and at the end.

    Only process 0 writes. Every line has `step` (optimizer steps done) and `seconds` (since this process started training). What a
    run that was killed had done beyond its last checkpoint is done and logged again: of a step's lines the last one counts.
    """

    def __init__(self, config: RunConfig, run_folder: Path, is_first: bool, loggers: Sequence[Any]) -> None:
        self.config, self.is_first, self.loggers = config, is_first, loggers
        self.lines, self.plot_path = Lines(run_folder / METRICS), run_folder / "losses.png"
        self.started = self.last_logged = time.monotonic()
        self.last_step = 0
        self.last_drawn = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clocks."""
        assert isinstance(pl_module, StageModule)
        self.started = self.last_logged = time.monotonic()
        self.last_step = pl_module.state.step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the step that was just taken."""
        assert isinstance(pl_module, StageModule)
        step = pl_module.state.step
        if step % self.config.trainer.log_every_steps and step != self.config.trainer.max_steps:
            return
        now = time.monotonic()
        tokens = (step - self.last_step) * self.config.trainer.global_batch_size * self.config.data.seq_len
        rate = tokens / max(now - self.last_logged, 1e-9)
        self.last_logged, self.last_step = now, step
        figures = {f"train/{name}": value for name, value in pl_module.last_metrics.items()}
        self._write({"step": step, **figures, "tokens_per_second": rate})

    def log_validation(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the means over the validation rows."""
        self._write({"step": step, **{f"validation/{name}": value for name, value in figures.items()}})
        # All processes wait for the picture.
        if time.monotonic() - self.last_drawn > _SECONDS_BETWEEN_PICTURES:
            self._draw()
        # Validation is not training time.
        self.last_logged, self.last_step = time.monotonic(), step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last picture, unless the run was asked to stop: then there may be little time."""
        assert isinstance(pl_module, StageModule)
        if not pl_module.stop_requested:
            self._draw()
        for logger in self.loggers:
            logger.experiment.finish()  # wandb's: what it has not written yet

    def _draw(self) -> None:
        if not self.is_first:
            return
        self.last_drawn = time.monotonic()
        try:
            draw_losses(self.lines.path, self.plot_path)
        except (UserError, OSError) as error:  # no picture is worth a run
            say(f"cola-train: warning: {self.plot_path} was not drawn: {error}")

    def _write(self, row: Mapping[str, float]) -> None:
        if not self.is_first:
            return
        row = {**row, "seconds": round(time.monotonic() - self.started, 3)}
        # JSON knows no NaN: what is not a number is null.
        self.lines.append({name: value if math.isfinite(value) else None for name, value in row.items()})
        for logger in self.loggers:
            logger.log_metrics({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))


class Progress(pl.Callback):
    """A bar over optimizer steps with rate, time left and the latest loss; plain lines where there is no terminal."""

    def __init__(self, max_steps: int, is_first: bool) -> None:
        self.max_steps, self.is_first = max_steps, is_first
        self.bar: tqdm[Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        assert isinstance(pl_module, StageModule)
        if self.is_first:
            interval = 0.5 if sys.stderr.isatty() else 30.0
            self.bar = tqdm(
                total=self.max_steps,
                initial=pl_module.state.step,
                desc="training",
                unit="step",
                mininterval=interval,
                maxinterval=interval,
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
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

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


def wandb_loggers(config: RunConfig, run_folder: Path) -> list[Any]:
    """The wandb logger where it is on. Offline unless `wandb.online`: files only, for `wandb sync`."""
    if not config.wandb.enabled:
        return []
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise UserError("wandb.enabled needs the package: pip install 'cola-train[wandb]', or set wandb.enabled=false.") from error
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(
        name=config.name, save_dir=run_folder, project=config.wandb.project, offline=not config.wandb.online, log_model=False
    )
    return [logger]
