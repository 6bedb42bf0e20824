"""Evaluation while a run trains: the evaluators of `inspect`, `likelihood` and `evaluate`, on a
plain copy of the weights.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError
from cola_train.console import say
from cola_train.data.prepared import PreparedData
from cola_train.data.tokenizer import Tokenizer
from cola_train.evaluation.benchmarks.answering import answer
from cola_train.evaluation.benchmarks.answers import Answer
from cola_train.evaluation.benchmarks.summary import accuracies
from cola_train.evaluation.benchmarks.tasks import Sample
from cola_train.evaluation.likelihood.likelihood import log_likelihoods_stream
from cola_train.evaluation.likelihood.perplexity import held_out_rows, perplexity_of
from cola_train.families.checkpoint import Checkpoint
from cola_train.training.callbacks.validation import Report
from cola_train.training.checkpoints.snapshot import gathered_weights, plain_copy, reference_copy
from cola_train.training.loop.module import StageModule

Samples = Mapping[str, Sequence[Sample]]


class InLoopEvaluation(pl.Callback):
    """Evaluates every `in_loop_eval.every_steps`, and at marks if asked, before the step is saved.

    Process 0 computes; the others wait, and hear at every batch that it goes on. A run that is
    asked to stop leaves an evaluation where it is; it is done again when the run goes on. All draws
    are addressed: training goes on as if it had not been.
    """

    def __init__(
        self,
        config: RunConfig,
        data: PreparedData,
        samples: Samples,
        tokenizer: Tokenizer,
        report: Report,
        see_inspection: Callable[[Mapping[str, float]], None],
    ) -> None:
        """`see_inspection` is told what an inspection found, on every process."""
        self.config, self.data, self.samples, self.tokenizer = config, data, samples, tokenizer
        self.report, self.see_inspection = report, see_inspection

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What an interrupted run left undone."""
        self._evaluate_if_due(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: object
    ) -> None:
        """A batch is an optimizer step."""
        self._evaluate_if_due(pl_module)

    def _evaluate_if_due(self, module: pl.LightningModule) -> None:
        assert isinstance(module, StageModule)
        state, config = module.state, self.config.in_loop_eval
        if state.step == 0 or state.evaluated_step == state.step or module.stop_requested:
            return
        at_mark = config.at_marks and module.budget.at_mark(state)
        if not at_mark and (config.every_steps == 0 or state.step % config.every_steps):
            return
        began = time.monotonic()
        weights = gathered_weights(module)
        parts = self._figures(module, weights) if module.processes.is_first else None
        figures: dict[str, float] = {}
        done = False
        while not done:
            part = {} if parts is None else next(parts, None)
            figures |= part or {}
            done, stopping = self._all_know(module, done=part is None)
            if stopping:
                module.stop_requested = True
                return
        figures = module.processes.agree(lambda: figures)
        self.report(state.step, figures, began)
        self.see_inspection(_below(figures, "inspection/"))
        state.evaluated_step = state.step

    def _all_know(self, module: StageModule, done: bool) -> tuple[bool, bool]:
        """Whether process 0 is done, and whether any process was asked to stop; a collective
        call.
        """
        module.watchdog.beat(f"evaluating after step {module.state.step}")
        flags = torch.tensor([int(done), int(module.stop.made)], device=module.processes.device)
        dist.all_reduce(flags)
        return bool(flags[0]), bool(flags[1])

    def _figures(
        self, module: StageModule, weights: dict[str, Tensor]
    ) -> Iterator[dict[str, float]]:
        """What each evaluator finds by names that begin with the evaluator's; and nothing after
        each batch.
        """
        checkpoint = plain_copy(module, weights, self.tokenizer)
        for evaluator in self.config.in_loop_eval.evaluators:
            if evaluator == "inspection":
                found = self._inspect(checkpoint, reference_copy(module, weights, self.tokenizer))
            else:
                found = (
                    self._likelihood(checkpoint)
                    if evaluator == "likelihood"
                    else self._benchmarks(checkpoint)
                )
            try:
                for part in found:
                    yield {f"{evaluator}/{name}": value for name, value in part.items()}
            # weights that have gone astray, say; the guard and the alarms are for those
            except UserError as error:
                say(f"cola-train: warning: no {evaluator} after step {module.state.step}: {error}")

    def _inspect(
        self, checkpoint: Checkpoint, reference: Checkpoint | None
    ) -> Iterator[dict[str, float]]:
        for found in checkpoint.inspect(self.data, self.config.in_loop_eval.inspection, reference):
            yield {} if found is None else found.figures()

    def _likelihood(self, checkpoint: Checkpoint) -> Iterator[dict[str, float]]:
        likelihood = self.config.in_loop_eval.likelihood
        rows = held_out_rows(self.data, likelihood.num_rows, checkpoint.masks_documents)
        found = {}
        for place, row in log_likelihoods_stream(checkpoint, rows, likelihood):
            found[place] = row
            yield {}
        yield perplexity_of(
            checkpoint, [found[place] for place in sorted(found)], likelihood
        ).metrics()

    def _benchmarks(self, checkpoint: Checkpoint) -> Iterator[dict[str, float]]:
        answers: list[Answer] = []
        for task, samples in self.samples.items():
            for found in answer(checkpoint, task, samples, self.config.in_loop_eval.benchmarks):
                answers.append(found)
                yield {}
        yield accuracies(answers)


def _below(figures: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {
        name.removeprefix(prefix): value
        for name, value in figures.items()
        if name.startswith(prefix)
    }
