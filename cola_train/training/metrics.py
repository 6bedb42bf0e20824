"""Where a run's figures go: metrics.jsonl always, a progress bar, wandb when asked, and a plot."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from tqdm import tqdm

from cola_train.config.runs import RunConfig
from cola_train.config.settings import UserError
from cola_train.training.module import StageModule
from cola_train.training.plot import draw_losses


class Metrics(pl.Callback):
    """Writes a line of metrics.jsonl every log_every_steps and at each validation, and redraws losses.png then.

    Only process 0 writes. Every line has `step` (optimizer steps taken) and `seconds` (since this process started training).
    """

    def __init__(self, config: RunConfig, run_folder: Path) -> None:
        self.config, self.path, self.plot_path = config, run_folder / "metrics.jsonl", run_folder / "losses.png"
        self.started = self.last_logged = time.monotonic()
        self.last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clocks."""
        self.started = self.last_logged = time.monotonic()
        self.last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the step that was just taken."""
        assert isinstance(pl_module, StageModule)
        step = trainer.global_step
        if step % self.config.trainer.log_every_steps and step != self.config.trainer.max_steps:
            return
        now = time.monotonic()
        tokens = (step - self.last_step) * self.config.trainer.global_batch_size * self.config.data.seq_len
        rate = tokens / max(now - self.last_logged, 1e-9)
        self.last_logged, self.last_step = now, step
        figures = {f"train/{name}": value for name, value in pl_module.last_metrics.items()}
        self._write(trainer, {"step": step, **figures, "tokens_per_second": rate})

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the means over the validation rows."""
        assert isinstance(pl_module, StageModule)
        figures = {f"validation/{name}": value for name, value in pl_module.validation_metrics().items()}
        self._write(trainer, {"step": trainer.global_step, **figures})
        if trainer.is_global_zero:
            draw_losses(self.path, self.plot_path)
        # Validation is not training time.
        self.last_logged, self.last_step = time.monotonic(), trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last picture."""
        if trainer.is_global_zero:
            draw_losses(self.path, self.plot_path)

    def _write(self, trainer: pl.Trainer, row: Mapping[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        row = {**row, "seconds": round(time.monotonic() - self.started, 3)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for logger in trainer.loggers:
            logger.log_metrics({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))


class Progress(pl.Callback):
    """A bar over optimizer steps with rate, time left and the latest loss; plain lines where there is no terminal."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        self.bar: tqdm[Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        if trainer.is_global_zero:
            interval = 0.5 if sys.stderr.isatty() else 30.0
            self.bar = tqdm(
                total=self.max_steps,
                initial=trainer.global_step,
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


def wandb_logger(config: RunConfig, run_folder: Path) -> Any:
    """The wandb logger, or False where it is off. Offline unless `wandb.online`: files only, for `wandb sync`."""
    if not config.wandb.enabled:
        return False
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise UserError("wandb.enabled needs the package: pip install 'cola-train[wandb]', or set wandb.enabled=false.") from error
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(
        name=config.name, save_dir=run_folder, project=config.wandb.project, offline=not config.wandb.online, log_model=False
    )
