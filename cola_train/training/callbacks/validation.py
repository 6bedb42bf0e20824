"""Validation during training: the means over the first held-out rows, always on the same noise."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from cola_train.config.run import RunConfig
from cola_train.data.batch import Batch
from cola_train.objectives.objective import Term, weights_of
from cola_train.training.data import RunData
from cola_train.training.loop.module import StageModule

Report = Callable[[int, Mapping[str, float], float], None]
_BATCHES_BETWEEN_LOOKS = 16


class Validation(pl.Callback):
    """Validates every `trainer.validate_every_steps` and at marks, before the step is saved.

    First of all it does what a resumed run's last step lacks.
    A run that is asked to stop leaves a validation where it is; it is done again when the run goes
    on.
    """

    def __init__(self, config: RunConfig, data: RunData, report: Report) -> None:
        self.config, self.data, self.report = config, data, report

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What an interrupted run left undone."""
        self._validate_if_due(pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
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
        with (
            module.ema.in_place_of_the_weights()
            if self.config.ema.evaluate
            else contextlib.nullcontext()
        ):
            figures = self._means(module)
        if figures is not None:
            self.report(
                state.step, {f"validation/{name}": value for name, value in figures.items()}, began
            )
            if math.isfinite(figures["loss"]):
                state.validated_step = state.step

    @torch.no_grad()
    def _means(self, module: StageModule) -> dict[str, float] | None:
        """The means, the same on every process; None if a process was asked to stop meanwhile."""
        device = module.processes.device
        totals, counts = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        terms: list[Term] = []
        module.eval()
        try:
            for number, batch in enumerate(
                self.data.validation_loader(module.processes.rank, module.processes.world_size)
            ):
                module.watchdog.beat(f"validating after step {module.state.step}")
                if number % _BATCHES_BETWEEN_LOOKS == 0 and module.asked_to_stop():
                    return None
                batch = Batch(*(tensor.to(device) for tensor in batch))
                with module.computing():
                    terms = module.objective(batch)
                _add(totals, {term.key: term.sum for term in terms})
                _add(counts, module.objective.counts(batch))
        finally:
            module.train()
        sums = torch.stack([*totals.values(), *counts.values()])
        dist.all_reduce(sums)
        found = dict(
            zip([*totals, *(f"count/{name}" for name in counts)], sums.tolist(), strict=True)
        )
        means = {
            term.key: found[term.key] / max(found[f"count/{term.denominator}"], 1) for term in terms
        }
        return module.objective.summarize(means, weights_of(terms))


def _add(totals: dict[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        totals[name] = totals[name] + value.double() if name in totals else value.double()
