"""An exponential moving average of the weights: each process keeps that of its own parts.

The average starts at the initial weights. With a constant decay of 0.9999 they would still be 78 %
of it after 2,500 steps; hence the warm-up, which is a function of the number of steps alone.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cola_train.config.loop import EMAConfig
from cola_train.processes import local_part


class EMA:
    """average = decay average + (1 - decay) weights after each step taken; empty if decay is 0."""

    def __init__(self, objective: nn.Module, config: EMAConfig) -> None:
        """`objective` is sharded, and its weights are not gathered (as in forward and backward)."""
        self._objective, self._config = objective, config
        self.tensors: dict[str, Tensor] = {}  # of trained parameters, sharded like them
        self._pairs: list[tuple[Tensor, Tensor]] = []
        for name, parameter in objective.named_parameters():
            if config.decay > 0 and parameter.requires_grad:
                self.tensors[name] = average = torch.zeros_like(parameter)
                self._pairs.append((local_part(average), local_part(parameter)))

    @torch.no_grad()
    def start(self) -> None:
        """Set the average to the weights as they are."""
        for average, weight in self._pairs:
            average.copy_(weight)

    @torch.no_grad()
    def update(self, steps_before: int) -> None:
        """Take in the weights after a step; `steps_before` were taken since the run began."""
        if self._pairs:
            decay = self._config.decay
            if self._config.warm_up:
                decay = min(decay, (1 + steps_before) / (10 + steps_before))
            averages, weights = zip(*self._pairs)
            torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextlib.contextmanager
    def in_place_of_the_weights(self) -> Iterator[None]:
        """While the block runs, the objective computes with the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # A root that computed without a backward still holds gathered weights: they would be stale.
        self._objective.reshard()  # type: ignore[operator]  # FSDP's
        for average, weight in self._pairs:
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
