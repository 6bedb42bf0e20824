"""Validation during training: the means over the first held-out rows, always on the same noise."""

import math
import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from cola_train.data.batch import Batch
from cola_train.objectives.objective import Term, weights_of
from cola_train.training.data import RunData
from cola_train.training.loop.module import StageCallback, StageModule
from cola_train.training.parallel.build import computing

# Logs the metrics of a step, by whole names, whose measuring began at that reading of the clock.
Report = Callable[[int, Mapping[str, float], float], None]
_BATCHES_BETWEEN_LOOKS = 16


class Validation(StageCallback):
    """Validates every `trainer.validate_every_steps` and at marks, before the step is saved.

    It begins with the validation that a resumed run's last step lacks: a run that is asked to stop
    abandons a validation, and repeats it when it resumes.
    """

    def __init__(self, data: RunData, report: Report) -> None:
        self.data, self.report = data, report

    def before_steps(self, stage: StageModule) -> None:
        self.after_step(stage)

    def after_step(self, stage: StageModule) -> None:
        state, every = stage.state, stage.config.trainer.validate_every_steps
        due = state.step > 0 and (state.step % every == 0 or stage.budget.at_mark(state))
        if not due or state.validated_step == state.step or stage.stop_requested:
            return
        began = time.monotonic()
        with stage.weights_to_evaluate():
            means = self._means(stage)
        if means is None:
            return
        metrics = {f"validation/{name}": value for name, value in means.items()}
        self.report(state.step, metrics, began)
        if math.isfinite(means["loss"]):
            state.validated_step = state.step

    @torch.no_grad()
    def _means(self, stage: StageModule) -> dict[str, float] | None:
        """The means, the same on every process; None if a process was asked to stop meanwhile."""
        processes, objective = stage.processes, stage.objective
        totals: dict[str, Tensor] = {}
        terms: list[Term] = []
        loader = self.data.validation_loader(processes.rank, processes.world_size)
        stage.eval()
        try:
            for number, batch in enumerate(loader):
                stage.watchdog.beat(f"validating after step {stage.state.step}")
                if number % _BATCHES_BETWEEN_LOOKS == 0 and stage.asked_to_stop():
                    return None
                batch = Batch(*(tensor.to(processes.device) for tensor in batch))
                with computing(stage.config, processes):
                    terms = objective(batch)
                sums = {term.key: term.sum for term in terms}
                counts = {f"count/{name}": n for name, n in objective.counts(batch).items()}
                for name, value in (sums | counts).items():
                    more = value.double()
                    totals[name] = totals[name] + more if name in totals else more
        finally:
            stage.train()
        over_all = torch.stack(list(totals.values()))
        dist.all_reduce(over_all)
        found = dict(zip(totals, over_all.tolist(), strict=True))
        means = {
            term.key: found[term.key] / max(found[f"count/{term.denominator}"], 1) for term in terms
        }
        return objective.summarize(means, weights_of(terms))
