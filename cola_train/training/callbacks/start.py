"""Where a run's tensors come from: initial values, another run's weights, or its own checkpoint."""

import lightning.pytorch as pl

from cola_train.config.run import RunConfig
from cola_train.families.registry import family_of
from cola_train.training.checkpoints.resume import Saved
from cola_train.training.checkpoints.tensors import CheckpointReader
from cola_train.training.loop.module import StageModule
from cola_train.training.loop.state import MODEL, RunState, fill
from cola_train.training.parallel.sharding import gather_each_once


class Start(pl.Callback):
    """Gives the sharded stage its values, once it has its optimizer; a collective call."""

    def __init__(self, config: RunConfig, own: Saved | None, warm: Saved | None) -> None:
        """Where the values are read from; without either they are the family's initial values.

        Args:
            config: the run.
            own: the run's checkpoint to resume from.
            warm: another run's checkpoint, for its weights alone.
        """
        self.config, self.own, self.warm = config, own, warm

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, StageModule)
        pl_module.watchdog.beat("reading or drawing the weights")
        if self.own is not None:
            folder, manifest = self.own
            CheckpointReader(folder, manifest).load(pl_module.saved_tensors())
            pl_module.state = RunState.from_json(manifest.state.to_json())
        else:
            self._begin(pl_module)
        gather_each_once(pl_module.objective)

    def _begin(self, stage: StageModule) -> None:
        objective = stage.objective
        if self.warm is not None:
            weights = {f"{MODEL}.{name}": value for name, value in objective.state_dict().items()}
            CheckpointReader(*self.warm).load(weights)
        else:
            shapes = {name: value.shape for name, value in objective.named_parameters()}
            fill(objective, family_of(self.config).initial_values(self.config, shapes))
        stage.ema.start()
