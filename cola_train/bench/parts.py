"""What a training step spends its time on: by part of the step, and by operation."""

import contextlib
import unittest.mock
from collections import defaultdict
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
    """Yield the seconds of each part of the stage's work in the block, filled when it ends.

    "the rest" is what is in no part: counts, exchange between processes. On a GPU each part begins
    and ends with a wait for the device, which makes steps slower: only shares are of use.
    """
    parts: dict[str, float] = defaultdict(float)
    begins: list[float] = []

    def begin(*arguments: Any) -> None:
        begins.append(clock.read())

    def end(name: str) -> Callable[..., None]:
        def add(*arguments: Any) -> None:
            parts[name] += clock.read() - begins.pop()

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
    handles = [
        optimizer.register_step_pre_hook(begin),
        optimizer.register_step_post_hook(end("optimizer")),
    ]
    # What the objective computes outside its networks is "losses".
    for path, name in {**forwards, "": "losses"}.items():
        if path in modules:
            handles.append(modules[path].register_forward_pre_hook(begin))
            handles.append(modules[path].register_forward_hook(end(name)))
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
def top_operations(device: torch.device) -> Iterator[list[dict[str, Any]]]:
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
