"""What a training step spends its time on: by part of the step, and by operation."""

import contextlib
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cola_train.bench.machine import Clock
from cola_train.training.loop.module import StageModule

_TOP = 10


@contextlib.contextmanager
def parts_of(stage: StageModule, clock: Clock) -> Iterator[dict[str, float]]:
    """Give the seconds by part of what the stage does while the block runs; what is in no part is
    "the rest": counts, exchange.

    On a GPU each part begins and ends with a wait for the device, which makes steps slower than
    they are: only shares are of use.
    """
    parts: dict[str, float] = {}
    begins: list[float] = []

    def begin(*arguments: Any) -> None:
        begins.append(clock.read())

    def end(name: str) -> Callable[..., None]:
        def add(*arguments: Any) -> None:
            parts[name] = parts.get(name, 0.0) + clock.read() - begins.pop()

        return add

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            begin()
            result = function(*arguments, **options)
            end(name)()
            return result

        return run

    modules, forwards = dict(stage.objective.named_modules()), stage.objective.timed_forwards
    optimizer = stage.optimizers(use_pl_optimizer=False)
    assert isinstance(optimizer, torch.optim.Optimizer)
    with contextlib.ExitStack() as held:
        handles = [
            optimizer.register_step_pre_hook(begin),
            optimizer.register_step_post_hook(end("optimizer")),
        ]
        # What the objective computes outside its networks is "losses".
        for path, name in {**forwards, "": "losses"}.items():
            if path in modules:
                handles += [
                    modules[path].register_forward_pre_hook(begin),
                    modules[path].register_forward_hook(end(name)),
                ]
        for handle in handles:
            held.callback(handle.remove)
        for owner, attribute, name in (
            (stage, "manual_backward", "backward"),
            (nn.utils, "clip_grad_norm_", "clip"),
        ):
            held.enter_context(
                unittest.mock.patch.object(owner, attribute, timed(name, getattr(owner, attribute)))
            )
        start = clock.read()
        yield parts
        whole = clock.read() - start
    parts["losses"] -= sum(parts.get(name, 0.0) for name in forwards.values())
    parts["the rest"] = whole - sum(parts.values())


@contextlib.contextmanager
def top_operations(device: torch.device) -> Iterator[list[dict[str, Any]]]:
    """Give the operations that take most time by themselves while the block runs: a GPU's kernels,
    or what a CPU computes.

    Each has `operation`, `seconds`, `share` (of all operations) and `calls`.
    """
    on_gpu = device.type == "cuda"
    found: list[dict[str, Any]] = []
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    ) as profiled:
        yield found
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(
        profiled.key_averages(), key=lambda event: getattr(event, attribute), reverse=True
    )
    whole = sum(getattr(event, attribute) for event in events)
    found += [
        {
            "operation": event.key,
            "seconds": getattr(event, attribute) / 1e6,
            "share": getattr(event, attribute) / whole,
            "calls": event.count,
        }
        for event in events[:_TOP]
    ]
