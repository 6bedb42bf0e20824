"""Evaluation while a run trains: `inspect`, `likelihood` and `evaluate`, on copied weights."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError
from cola_train.console import say
from cola_train.data.prepared import PreparedData
from cola_train.evaluation.benchmarks.answering import answer
from cola_train.evaluation.benchmarks.answers import Answer
from cola_train.evaluation.benchmarks.results import accuracies
from cola_train.evaluation.benchmarks.tasks import Sample
from cola_train.evaluation.likelihood.likelihood import log_likelihoods_stream
from cola_train.evaluation.likelihood.perplexity import held_out_rows, perplexity_of
from cola_train.families.checkpoint import Checkpoint
from cola_train.training.callbacks.stage_callback import StageCallback
from cola_train.training.callbacks.validation import Report
from cola_train.training.checkpoints.snapshot import gathered_weights, plain_copy, reference_copy
from cola_train.training.loop.module import StageModule


class InLoopEvaluation(StageCallback):
    """Evaluates every `in_loop_eval.every_steps`, and at marks if asked, before the step is saved.

    Process 0 computes; the others wait, and hear at every batch that it is still at work. A run
    that is asked to stop abandons an evaluation, and repeats it when it resumes. All draws are
    addressed: training continues as if nothing had been evaluated.
    """

    def __init__(
        self,
        config: RunConfig,
        data: PreparedData,
        samples: Mapping[str, Sequence[Sample]],
        report: Report,
        see_inspection: Callable[[Mapping[str, float]], None],
    ) -> None:
        """`samples` by task; `see_inspection` hears of each inspection, on every process."""
        self.config, self.data, self.samples = config, data, samples
        self.report, self.see_inspection = report, see_inspection

    def before_steps(self, stage: StageModule) -> None:
        self.after_step(stage)

    def after_step(self, stage: StageModule) -> None:
        state, config = stage.state, self.config.in_loop_eval
        if state.step == 0 or state.evaluated_step == state.step or stage.stop_requested:
            return
        at_mark = config.at_marks and stage.budget.at_mark(state)
        if not at_mark and (config.every_steps == 0 or state.step % config.every_steps):
            return
        began = time.monotonic()
        weights = gathered_weights(stage)
        parts = self._measure(stage, weights) if stage.processes.is_first else None
        metrics: dict[str, float] = {}
        done = False
        while not done:
            part = {} if parts is None else next(parts, None)
            metrics |= part or {}
            done, stopping = self._all_know(stage, done=part is None)
            if stopping:
                stage.stop_requested = True
                return
        metrics = stage.processes.agree(lambda: metrics)
        self.report(state.step, metrics, began)
        prefix = "inspection/"
        self.see_inspection(
            {
                name.removeprefix(prefix): value
                for name, value in metrics.items()
                if name.startswith(prefix)
            }
        )
        state.evaluated_step = state.step

    def _all_know(self, stage: StageModule, done: bool) -> tuple[bool, bool]:
        """Whether process 0 is done, and whether any was asked to stop; a collective call."""
        stage.watchdog.beat(f"evaluating after step {stage.state.step}")
        flags = torch.tensor([int(done), int(stage.stop.made)], device=stage.processes.device)
        dist.all_reduce(flags)
        return bool(flags[0]), bool(flags[1])

    def _measure(
        self, stage: StageModule, weights: dict[str, Tensor]
    ) -> Iterator[dict[str, float]]:
        """What each evaluator finds, as EVALUATOR/NAME; an empty dictionary after each batch."""
        tokenizer = self.data.tokenizer
        checkpoint = plain_copy(stage, weights, tokenizer)
        for evaluator in self.config.in_loop_eval.evaluators:
            if evaluator == "inspection":
                found = self._inspect(checkpoint, reference_copy(stage, weights, tokenizer))
            elif evaluator == "likelihood":
                found = self._likelihood(checkpoint)
            else:
                found = self._benchmarks(checkpoint)
            try:
                for part in found:
                    yield {f"{evaluator}/{name}": value for name, value in part.items()}
            # of weights that diverged, say; those are for the guard and the alarms
            except UserError as error:
                say(f"cola-train: warning: no {evaluator} after step {stage.state.step}: {error}")

    def _inspect(
        self, checkpoint: Checkpoint, reference: Checkpoint | None
    ) -> Iterator[dict[str, float]]:
        for found in checkpoint.inspect(self.data, self.config.in_loop_eval.inspection, reference):
            yield {} if found is None else found.metrics()

    def _likelihood(self, checkpoint: Checkpoint) -> Iterator[dict[str, float]]:
        likelihood = self.config.in_loop_eval.likelihood
        rows = held_out_rows(self.data, likelihood.num_rows, checkpoint.masks_documents)
        found = {}
        for place, row in log_likelihoods_stream(checkpoint, rows, likelihood):
            found[place] = row
            yield {}
        in_order = [found[place] for place in sorted(found)]
        yield perplexity_of(checkpoint, in_order, likelihood).metrics()

    def _benchmarks(self, checkpoint: Checkpoint) -> Iterator[dict[str, float]]:
        answers: list[Answer] = []
        for task, samples in self.samples.items():
            for found in answer(checkpoint, task, samples, self.config.in_loop_eval.benchmarks):
                answers.append(found)
                yield {}
        yield accuracies(answers)
