"""Validation during training: the means over the first held-out rows, always on the same noise."""

import math
import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from cola_train.config.run import RunConfig
from cola_train.data.batch import Batch
from cola_train.objectives.objective import Term, weights_of
from cola_train.training.callbacks.stage_callback import StageCallback
from cola_train.training.data import RunData
from cola_train.training.loop.module import StageModule
from cola_train.training.parallel.build import computing

# Logs the metrics of a step, by whole names, whose measuring began at that reading of the clock.
Report = Callable[[int, Mapping[str, float], float], None]
_BATCHES_BETWEEN_LOOKS = 16


class Validation(StageCallback):
    """Validates every `trainer.validate_every_steps` and at marks, before the step is saved.

    It begins with the validation that a resumed run's last step lacks: a run that is asked to stop
    abandons a validation, and repeats it when it resumes.
    """

    def __init__(self, config: RunConfig, data: RunData, report: Report) -> None:
        self.config, self.data, self.report = config, data, report

    def before_steps(self, stage: StageModule) -> None:
        self.after_step(stage)

    def after_step(self, stage: StageModule) -> None:
        state, every = stage.state, self.config.trainer.validate_every_steps
        due = state.step > 0 and (state.step % every == 0 or stage.budget.at_mark(state))
        if not due or state.validated_step == state.step or stage.stop_requested:
            return
        began = time.monotonic()
        with stage.weights_to_evaluate():
            means = self._means(stage)
        if means is None:
            return
        self.report(
            state.step, {f"validation/{name}": value for name, value in means.items()}, began
        )
        if math.isfinite(means["loss"]):
            state.validated_step = state.step

    @torch.no_grad()
    def _means(self, stage: StageModule) -> dict[str, float] | None:
        """The means, the same on every process; None if a process was asked to stop meanwhile."""
        processes, objective = stage.processes, stage.objective
        totals, counts = dict[str, Tensor](), dict[str, Tensor]()
        terms: list[Term] = []
        loader = self.data.validation_loader(processes.rank, processes.world_size)
        stage.eval()
        try:
            for number, batch in enumerate(loader):
                stage.watchdog.beat(f"validating after step {stage.state.step}")
                if number % _BATCHES_BETWEEN_LOOKS == 0 and stage.asked_to_stop():
                    return None
                batch = Batch(*(tensor.to(processes.device) for tensor in batch))
                with computing(self.config, processes):
                    terms = objective(batch)
                _add(totals, {term.key: term.sum for term in terms})
                _add(counts, objective.counts(batch))
        finally:
            stage.train()
        sums = torch.stack([*totals.values(), *counts.values()])
        dist.all_reduce(sums)
        names = [*totals, *(f"count/{name}" for name in counts)]
        found = dict(zip(names, sums.tolist(), strict=True))
        means = {
            term.key: found[term.key] / max(found[f"count/{term.denominator}"], 1) for term in terms
        }
        return objective.summarize(means, weights_of(terms))


def _add(totals: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        totals[name] = totals[name] + value.double() if name in totals else value.double()
