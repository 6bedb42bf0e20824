"""An exponential moving average of the weights: each process keeps that of its own parts."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cola_train.processes import local_part


class EMA:
    """average = decay average + (1 - decay) weights after each step taken; empty if decay is 0."""

    def __init__(self, objective: nn.Module, decay: float) -> None:
        """`objective` is sharded, and its weights are not gathered (as in forward and backward)."""
        self._objective, self._decay = objective, decay
        self.tensors: dict[str, Tensor] = {}  # of trained parameters, sharded like them
        self._pairs: list[tuple[Tensor, Tensor]] = []
        for name, parameter in objective.named_parameters():
            if decay > 0 and parameter.requires_grad:
                self.tensors[name] = average = torch.zeros_like(parameter)
                self._pairs.append((local_part(average), local_part(parameter)))

    @torch.no_grad()
    def start(self) -> None:
        """Set the average to the weights as they are."""
        for average, weight in self._pairs:
            average.copy_(weight)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        if self._pairs:
            averages, weights = zip(*self._pairs)
            torch._foreach_lerp_(averages, weights, 1 - self._decay)

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
