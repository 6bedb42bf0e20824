"""A stage as a Lightning module: step = objective(batch), clip, optimize, log. No maths here.

Optimization is by hand, so that one `training_step` is one optimizer step: its micro-batches share
their means' denominators (objectives/objective.py), a checkpoint never falls between micro-batches,
and a bad step is seen before it reaches the weights.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cola_train.config.run import RunConfig
from cola_train.console import say
from cola_train.data.batch import Batch
from cola_train.json_lines import JsonlWriter
from cola_train.objectives.objective import Objective, Term, total_loss, weights_of
from cola_train.processes import Processes
from cola_train.training.loop import guard
from cola_train.training.loop.budget import Budget
from cola_train.training.loop.interrupts import StopRequest
from cola_train.training.loop.state import RunState, saved_tensors
from cola_train.training.loop.step_log import Step, StepLog, digest_text, sample_digest
from cola_train.training.loop.watchdog import Watchdog
from cola_train.training.optim.ema import EMA
from cola_train.training.optim.optimizers import build_optimizer, set_learning_rate
from cola_train.training.optim.schedule import Schedule
from cola_train.training.parallel.build import build_sharded, computing, materialize


class StageModule(pl.LightningModule):
    """A run of any family: the objective says what is minimized."""

    objective: Objective
    ema: EMA  # the average of the weights, where the config asks for one

    def __init__(self, config: RunConfig, processes: Processes, stop: StopRequest) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config, self.processes, self.stop = config, processes, stop
        self.watchdog = Watchdog(processes.rank, config.parallel.timeout_seconds)
        # `state.step` says which optimizer step comes next.
        self.state, self.budget, self.schedule = RunState(), Budget(config), Schedule.of(config)
        self.step_log: StepLog | None = None
        # Of the latest step: its metrics, the weights of its loss terms, and what its loss was
        # compared with; None while too few losses are known.
        self.last_metrics: dict[str, float] = {}
        self.last_weights: dict[str, float] = {}
        self.last_usual_loss: guard.UsualLoss | None = None
        # That some process was asked to stop, and that the save under way is on disk on every
        # process: known to all from the start of a step on.
        self.stop_requested = self.all_have_written = False
        self.written: Callable[[], bool] = lambda: False  # whether this process' part is on disk
        self.logs: list[JsonlWriter] = []  # made durable before each checkpoint

    @property
    def is_done(self) -> bool:
        """Whether the run's last step has been done, or it was asked to stop."""
        return self.stop_requested or self.budget.is_spent(self.state)

    def configure_model(self) -> None:
        """Build and shard, once: each process has memory for its part, still without values."""
        if not hasattr(self, "objective"):
            self.objective = build_sharded(self.config, self.processes)
            materialize(self.objective, self.config, self.processes)
            self.ema = EMA(self.objective, self.config.ema)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        products = torch.bfloat16 if self.config.trainer.in_bf16 else torch.float32
        return build_optimizer(self.objective, self.config.optim, products)

    def saved_tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, live."""
        return saved_tensors(self.objective, self._optimizer(), self.ema.tensors)

    def weights_to_evaluate(self) -> contextlib.AbstractContextManager[None]:
        """While the block runs, the weights are those to evaluate (`ema.evaluate`: the average)."""
        if self.config.ema.evaluate:
            return self.ema.in_place_of_the_weights()
        return contextlib.nullcontext()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One optimizer step over all of this process' rows."""
        step, optimizer = self.state.step, self._optimizer()
        self.watchdog.beat(f"in the forward or backward of step {step + 1}")
        parts = (tensor.split(self.config.trainer.micro_batch_size) for tensor in batch)
        micro_batches = [Batch(*tensors) for tensors in zip(*parts, strict=True)]
        counts, rows, digest = self._agree(micro_batches, batch)
        sums: dict[str, Tensor] = {}
        assert isinstance(self.objective, FSDPModule)
        for number, micro_batch in enumerate(micro_batches, start=1):
            # Gradients are reduced over processes in the last micro-batch alone.
            self.objective.set_requires_gradient_sync(number == len(micro_batches))
            with computing(self.config, self.processes):
                terms: list[Term] = self.objective(micro_batch, step)
            # Gradients are averaged over processes; the losses are shares of a global mean to add.
            self.manual_backward(total_loss(terms, counts) * self.processes.world_size)
            for term in terms:
                share = term.share(counts).detach()
                sums[term.key] = sums[term.key] + share if term.key in sums else share
        weights = weights_of(terms)
        clip = self.config.optim.gradient_clip
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), clip)
        means = torch.stack([value.float() for value in sums.values()])
        dist.all_reduce(means)
        metrics = self.objective.summarize(dict(zip(sums, means.tolist(), strict=True)), weights)
        metrics["gradient_norm"] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        kind, window = " ".join(sorted(weights)), self.config.guard.spike_window
        # Before this loss is among those that it is compared with.
        self.last_usual_loss = guard.usual_loss(self.state, kind, window)
        skipped = guard.reason_to_skip(self.config.guard, metrics, self.last_usual_loss)
        metrics["learning_rate"] = self.schedule.rate(step)
        set_learning_rate(optimizer, metrics["learning_rate"])
        if skipped is None:
            self.optimizers().step()  # type: ignore[union-attr]  # one optimizer: Lightning's wrapper of it
            self.ema.update(step - self.state.skipped_steps)
            guard.count_taken(self.state, kind, window, metrics["loss"])
        else:
            if self.processes.is_first:
                say(
                    f"cola-train: warning: optimizer step {step + 1} is not taken, on any process "
                    f"({skipped})."
                )
            guard.count_skipped(self.config.guard, self.state, skipped)
        optimizer.zero_grad()
        self.budget.spend(self.state)
        metrics["skipped_steps"] = self.state.skipped_steps
        self.last_metrics, self.last_weights = metrics, weights
        if self.step_log is not None:
            self.step_log.write(Step(self.state.step, rows, digest_text(digest), skipped))

    def asked_to_stop(self) -> bool:
        """Ask all processes, between steps, whether one was asked to stop; a collective call."""
        asked = torch.tensor(int(self.stop.made), device=self.processes.device)
        dist.all_reduce(asked)
        self.stop_requested = self.stop_requested or bool(asked)
        return self.stop_requested

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer

    def _agree(
        self, micro_batches: list[Batch], batch: Batch
    ) -> tuple[dict[str, Tensor], int, int]:
        """What all processes must know of each other before a step, in one exchange.

        It gives the step's counts, over all processes and micro-batches, how many rows it uses, and
        their digest.
        """
        per_batch = [self.objective.counts(part) for part in micro_batches]
        names = list(per_batch[0])
        by_batch = [torch.stack([part[name] for name in names]) for part in per_batch]
        counts = torch.stack(by_batch).sum(0)
        digest = sample_digest(self.config.seed, batch.sample_index, batch.row_index)
        flags = counts.new_tensor([len(batch.sample_index), self.stop.made, self.written()])
        total = torch.cat([counts, digest[None], flags])
        dist.all_reduce(total)
        used_digest, rows, stopping, written = total[len(names) :].tolist()
        self.stop_requested = stopping > 0
        self.all_have_written = written == self.processes.world_size
        return dict(zip(names, total.float(), strict=False)), rows, used_digest


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
