"""While a run trains: `inspect`, `likelihood` and `evaluate`, and sample texts, on copied weights.

The copies are plain: a sharded network must not be called outside its root, and what is scored is
what ships.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from cola_train.config.evaluation import InLoopEvalConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.console import only_warned
from cola_train.data.prepared import PreparedData
from cola_train.data.tokenizer import Tokenizer
from cola_train.evaluation.benchmarks.answering import answer
from cola_train.evaluation.benchmarks.answers import Answer
from cola_train.evaluation.benchmarks.results import accuracies
from cola_train.evaluation.benchmarks.tasks import Sample
from cola_train.evaluation.likelihood.likelihood import log_likelihoods_stream
from cola_train.evaluation.likelihood.perplexity import held_out_rows
from cola_train.evaluation.likelihood.rates import perplexity_of
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.generate import generate
from cola_train.families.registry import family_of
from cola_train.json_lines import JsonlWriter
from cola_train.run_layout import SAMPLES
from cola_train.training.callbacks.validation import Report
from cola_train.training.checkpoints.export import trained_run
from cola_train.training.loop.module import StageCallback, StageModule


def gathered_weights(stage: StageModule) -> dict[str, Tensor]:
    """The objective's whole tensors (`ema.evaluate`: averages), on process 0's CPU; collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    with stage.weights_to_evaluate():
        state = get_model_state_dict(stage.objective, options=options)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def plain_copy(stage: StageModule, weights: dict[str, Tensor], tokenizer: Tokenizer) -> Checkpoint:
    """The checkpoint of gathered weights, as an export of this step would hold it."""
    run = trained_run(stage.config, weights, tokenizer, stage.state.step)
    return family_of(stage.config).checkpoint(run, stage.processes.device)


class Samples(StageCallback):
    """Continues `trainer.sample_prompts` every `sample_every_steps`, always with the same noise."""

    def __init__(self, run_folder: Path, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.lines = tokenizer, JsonlWriter(run_folder / SAMPLES)

    def after_step(self, stage: StageModule) -> None:
        every, step = stage.config.trainer.sample_every_steps, stage.state.step
        if not every or step % every or stage.stop_requested:
            return
        stage.watchdog.beat(f"writing sample texts after step {step}")
        weights = gathered_weights(stage)
        if not stage.processes.is_first:
            return
        prompts = stage.config.trainer.sample_prompts
        sampler = SamplerConfig(max_new_tokens=max(1, stage.config.data.seq_len // 2))
        with only_warned(f"no sample texts after step {step}"):
            checkpoint = plain_copy(stage, weights, self.tokenizer)
            for prompt, result in zip(prompts, generate(checkpoint, prompts, sampler), strict=True):
                self.lines.append({"step": step, "prompt": prompt, "text": result.text})


class InLoopEvaluation(StageCallback):
    """Evaluates every `in_loop_eval.every_steps`, and at marks if asked, before the step is saved.

    Process 0 computes; the others wait, and hear at every batch that it is still at work. A run
    that is asked to stop abandons an evaluation, and repeats it when it resumes. All draws are
    addressed: training continues as if nothing had been evaluated.
    """

    def __init__(
        self,
        config: InLoopEvalConfig,
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
        state, every = stage.state, self.config.every_steps
        if state.step == 0 or state.evaluated_step == state.step or stage.stop_requested:
            return
        at_mark = self.config.at_marks and stage.budget.at_mark(state)
        if not at_mark and (every == 0 or state.step % every):
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
        inspected = {name: value for name, value in metrics.items() if name.startswith(prefix)}
        self.see_inspection({name.removeprefix(prefix): inspected[name] for name in inspected})
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
        step = stage.state.step
        # Of weights that diverged, say, or for lack of memory: that is no reason to end a run.
        with only_warned(f"no evaluation after step {step}"):
            checkpoint = plain_copy(stage, weights, self.data.tokenizer)
            for evaluator in self.config.evaluators:
                with only_warned(f"no {evaluator} after step {step}"):
                    for part in self._found(evaluator, stage, weights, checkpoint):
                        yield {f"{evaluator}/{name}": value for name, value in part.items()}

    def _found(
        self, evaluator: str, stage: StageModule, weights: dict[str, Tensor], checkpoint: Checkpoint
    ) -> Iterator[dict[str, float]]:
        if evaluator == "likelihood":
            return self._likelihood(checkpoint)
        if evaluator == "benchmarks":
            return self._benchmarks(checkpoint)
        # What the run's drift is measured from, as it began.
        began = trained_run(stage.config, weights, self.data.tokenizer, step=0)
        reference = family_of(stage.config).reference(began, stage.processes.device)
        return self._inspection(checkpoint, reference)

    def _inspection(
        self, checkpoint: Checkpoint, reference: Checkpoint | None
    ) -> Iterator[dict[str, float]]:
        for found in checkpoint.inspect(self.data, self.config.inspection, reference):
            yield {} if found is None else found.metrics()

    def _likelihood(self, checkpoint: Checkpoint) -> Iterator[dict[str, float]]:
        likelihood = self.config.likelihood
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
            for found in answer(checkpoint, task, samples, self.config.benchmarks):
                answers.append(found)
                yield {}
        yield accuracies(answers)
