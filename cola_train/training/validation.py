"""Validation during training: the means over the first held-out rows, always on the same noise."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from cola_train.config.runs import RunConfig
from cola_train.data.datamodule import Batch, PreparedDataModule
from cola_train.objectives.losses import DENOMINATORS, Losses, summarise
from cola_train.training.module import StageModule

Report = Callable[[int, Mapping[str, float], float], None]
_BATCHES_BETWEEN_LOOKS = 16


class Validation(pl.Callback):
    """Validates every `trainer.validate_every_steps` and at marks, before the step is saved.

    First of all it does what a resumed run's last step lacks.
    A run that is asked to stop leaves a validation where it is; it is done again when the run goes on.
    """

    def __init__(self, config: RunConfig, datamodule: PreparedDataModule, report: Report) -> None:
        self.config, self.datamodule, self.report = config, datamodule, report

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What an interrupted run left undone."""
        self._validate_if_due(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A batch is an optimizer step."""
        self._validate_if_due(pl_module)

    def _validate_if_due(self, module: pl.LightningModule) -> None:
        assert isinstance(module, StageModule)
        state, every = module.state, self.config.trainer.validate_every_steps
        due = state.step > 0 and (state.step % every == 0 or module.budget.at_mark(state))
        if not due or state.validated_step == state.step or module.stop_requested:
            return
        began = time.monotonic()
        with module.average.in_place_of_the_weights() if self.config.ema.evaluate else contextlib.nullcontext():
            figures = self._means(module)
        if figures is not None:
            self.report(state.step, {f"validation/{name}": value for name, value in figures.items()}, began)
            if math.isfinite(figures["loss"]):
                state.validated_step = state.step

    @torch.no_grad()
    def _means(self, module: StageModule) -> dict[str, float] | None:
        """The means, the same on every process; None if a process was asked to stop meanwhile."""
        device = module.processes.device
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        totals: dict[str, torch.Tensor] = {}
        weights: dict[str, float] = {}
        module.eval()
        try:
            for number, batch in enumerate(self.datamodule.validation_loader()):
                module.watchdog.beat(f"validating after step {module.state.step}")
                if number % _BATCHES_BETWEEN_LOOKS == 0 and module.asked_to_stop():
                    return None
                batch = Batch(*(tensor.to(device) for tensor in batch))
                counts = module.objective.counts(batch)  # type: ignore[operator]  # both objectives have it
                ones = {name: torch.ones_like(value, dtype=torch.float32) for name, value in counts.items()}
                with module.computing():
                    losses: Losses = module.objective(batch, ones)
                weights = losses.weights
                sums = {**losses.figures(), **{f"count/{name}": value for name, value in counts.items()}}
                for name, value in sums.items():
                    totals[name] = totals.get(name, nothing) + value.double()
        finally:
            module.train()
        total = torch.stack(list(totals.values()))
        dist.all_reduce(total)
        found = dict(zip(totals, total.tolist(), strict=True))
        counts_of = {name: max(found[f"count/{count}"], 1) for name, count in DENOMINATORS.items() if name in found}
        return summarise({name: found[name] / count for name, count in counts_of.items()}, weights)
