"""Lightning's hooks around steps, with the run's stage in place of Lightning's own types."""

from typing import Any

import lightning.pytorch as pl

from cola_train.training.loop.module import StageModule


class StageCallback(pl.Callback):
    """What happens around steps, on every process; a batch of Lightning's is an optimizer step."""

    def before_steps(self, stage: StageModule) -> None:
        """The weights have their values, and no step has been done since the run was started."""

    def after_step(self, stage: StageModule) -> None:
        """Another step has been done, the run's `stage.state.step`-th; it may have been skipped."""

    def after_steps(self, stage: StageModule) -> None:
        """The loop has ended, but not by an exception."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, StageModule)
        self.before_steps(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any
    ) -> None:
        assert isinstance(pl_module, StageModule)
        self.after_step(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, StageModule)
        self.after_steps(pl_module)
