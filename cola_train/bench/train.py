"""`cola-train bench train`, in the measuring process: training steps on random tokens."""

import contextlib
import functools
import itertools
import statistics
import unittest.mock
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cola_train.bench.config import BenchTrainConfig, MemoryTooSmallError
from cola_train.bench.machine import Clock, Memory, Speedometer, spread
from cola_train.bench.workloads import random_batch, randomize
from cola_train.config.run import RunConfig
from cola_train.config.settings import require
from cola_train.console import progress_bar
from cola_train.families.costs import network_parameters, step_flops
from cola_train.families.registry import family_of
from cola_train.processes import connected
from cola_train.training.loop.interrupts import StopRequest
from cola_train.training.loop.lightning import build_trainer
from cola_train.training.loop.module import StageModule
from cola_train.training.parallel.sharding import gather_each_once
from cola_train.training.preflight import with_precision

_TOP = 10


def measure_train(config: BenchTrainConfig, run: RunConfig) -> dict[str, Any]:
    """Measure, in this process, what `cola-train bench train` reports, see docs/benchmarks.md.

    Steps are those of the training loop (training/loop/module.py), with the same Trainer and
    sharding, on one process. First whole ones are timed; parts, and the profile, are of steps after
    these, since watching takes time.

    Raises:
        UserError: a GPU is asked for and there is none, or its memory is too small.
    """
    trainer = run.trainer
    require(
        trainer.accelerator != "gpu" or torch.cuda.is_available(),
        "trainer.accelerator=gpu, but torch sees no GPU here; use cpu or auto, or see `cola-train "
        "doctor`.",
    )
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    with connected(trainer.accelerator, run.parallel.timeout_seconds) as processes:
        run = with_precision(run, None)
        stage = StageModule(run, processes, StopRequest())
        measure = _Measure(config, Clock(processes.device, config.threads))
        batches = itertools.repeat(random_batch(run))
        try:
            build_trainer(run, processes, [measure]).fit(stage, train_dataloaders=batches)
        except torch.OutOfMemoryError:
            raise MemoryTooSmallError(
                f"The GPU has too little memory for {trainer.micro_batch_size} rows of "
                f"{run.data.seq_len} tokens: give fewer rows, or "
                "parallel.activation_checkpointing=full."
            ) from None
        skipped = stage.state.skipped_steps
        assert skipped == 0, "steps were skipped: what was timed is not a whole step"
        return measure.result(run)


class _Measure(pl.Callback):
    """Times steps from outside: warm-ups, counted runs, steps taken apart, one profiled."""

    def __init__(self, config: BenchTrainConfig, clock: Clock) -> None:
        self._config, self._clock, self._speedometer = config, clock, Speedometer(clock)
        self._seconds: list[float] = []  # of every step
        self._parts: list[dict[str, float]] = []
        self._top: list[dict[str, Any]] | None = None
        self._memory: Memory | None = None
        self._used: dict[str, int] = {}
        self._begin = 0.0
        self._counted = config.warmups + config.runs
        self._taken_apart = self._counted + max(2, config.runs // 2)
        self._last = self._taken_apart + config.profile
        self._watching = contextlib.ExitStack()
        self._bar = progress_bar("measuring", "step", self._last)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, StageModule)
        randomize(pl_module.objective)
        gather_each_once(pl_module.objective)
        pl_module.ema.start()
        self._speedometer.read()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any
    ) -> None:
        assert isinstance(pl_module, StageModule)
        if self._memory is None:
            self._memory = Memory(self._clock.device)
        step = len(self._seconds)
        if step >= self._taken_apart:
            self._top = self._watching.enter_context(_top_operations(self._clock.device))
        elif step >= self._counted:
            self._parts.append(self._watching.enter_context(_parts_of(pl_module, self._clock)))
        self._begin = self._clock.read()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any
    ) -> None:
        self._seconds.append(self._clock.read() - self._begin)
        self._watching.close()
        if len(self._seconds) == self._counted:
            assert self._memory is not None
            self._used = self._memory.used()
            self._speedometer.read()
        self._bar.update(1)
        if len(self._seconds) == self._last:
            self._bar.close()
            trainer.should_stop = True

    def result(self, run: RunConfig) -> dict[str, Any]:
        """The measurements of this run's steps."""
        trainer, precision = run.trainer, run.trainer.precision
        seconds = spread(self._seconds[self._config.warmups : self._counted])
        tokens = trainer.global_batch_size * run.data.seq_len
        parts = {
            name: statistics.fmean(step[name] for step in self._parts) for name in self._parts[0]
        }
        whole = sum(parts.values())
        return {
            "workload": self._config.workload,
            "rows": trainer.micro_batch_size,
            "micro_batches": trainer.global_batch_size // trainer.micro_batch_size,
            "seq_len": run.data.seq_len,
            "tokens": tokens,
            "parameters": network_parameters(run),
            "backbone_parameters": family_of(run).backbone_parameters(run),
            "precision": precision,
            "activation_checkpointing": run.parallel.activation_checkpointing,
            "machine": self._speedometer.report(),
            "seconds": seconds,
            **self._speedometer.rates(tokens, step_flops(run, 0), seconds["median"], precision),
            "memory": self._used,
            "parts": {
                name: {"seconds": value, "share": value / whole} for name, value in parts.items()
            },
            "top_operations": self._top,
        }


@contextlib.contextmanager
def _parts_of(stage: StageModule, clock: Clock) -> Iterator[dict[str, float]]:
    """Yield the seconds of each part of the stage's work in the block, filled when it ends.

    "the rest" is what is in no part: counts, exchange between processes. On a GPU each part begins
    and ends with a wait for the device, which makes steps slower: only shares are of use.
    """
    parts: dict[str, float] = defaultdict(float)
    begins: list[float] = []

    def begin(*arguments: Any) -> None:
        begins.append(clock.read())

    def end(name: str, *arguments: Any) -> None:
        parts[name] += clock.read() - begins.pop()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            begin()
            result = function(*arguments, **options)
            end(name)
            return result

        return run

    modules, forwards = dict(stage.objective.named_modules()), stage.objective.timed_forwards
    optimizer = stage.optimizers(use_pl_optimizer=False)
    assert isinstance(optimizer, torch.optim.Optimizer)
    handles = [
        optimizer.register_step_pre_hook(begin),
        optimizer.register_step_post_hook(functools.partial(end, "optimizer")),
    ]
    # What the objective computes outside its networks is "losses".
    for path, name in {**forwards, "": "losses"}.items():
        if path in modules:
            handles.append(modules[path].register_forward_pre_hook(begin))
            handles.append(modules[path].register_forward_hook(functools.partial(end, name)))
    with contextlib.ExitStack() as held:
        for handle in handles:
            held.callback(handle.remove)
        for owner, attribute, name in (
            (stage, "manual_backward", "backward"),
            (nn.utils, "clip_grad_norm_", "clip"),
        ):
            function = timed(name, getattr(owner, attribute))
            held.enter_context(unittest.mock.patch.object(owner, attribute, function))
        start = clock.read()
        yield parts
        whole = clock.read() - start
    parts["losses"] -= sum(parts.get(name, 0.0) for name in forwards.values())
    parts["the rest"] = whole - sum(parts.values())


@contextlib.contextmanager
def _top_operations(device: torch.device) -> Iterator[list[dict[str, Any]]]:
    """Yield the operations of most self time in the block, a GPU's kernels or a CPU's operations.

    Filled when it ends: each has `operation`, `seconds`, `share` (of all operations) and `calls`.
    """
    activities, attribute = [ProfilerActivity.CPU], "self_cpu_time_total"
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        attribute = "self_device_time_total"
    found: list[dict[str, Any]] = []
    with profile(activities=activities) as profiled:
        yield found
    times = [(getattr(event, attribute), event) for event in profiled.key_averages()]
    times.sort(key=lambda one: one[0], reverse=True)
    whole = sum(microseconds for microseconds, _ in times)
    found += [
        {
            "operation": event.key,
            "seconds": microseconds / 1e6,
            "share": microseconds / whole,
            "calls": event.count,
        }
        for microseconds, event in times[:_TOP]
    ]
