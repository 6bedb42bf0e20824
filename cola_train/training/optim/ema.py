"""An exponential moving average of the weights: each process keeps that of its own parts."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cola_train.processes import local_part


class EMA:
    """average = decay average + (1 - decay) weights after each step taken; empty where decay is 0.

    Attributes:
        tensors: the averages by parameter name, sharded like the parameters, trained ones alone.
    """

    def __init__(self, objective: nn.Module, decay: float) -> None:
        """The objective sharded, its parameters' parts the module's own (as they are outside
        forward and backward).
        """
        self._objective, self._decay = objective, decay
        trained = (
            {name: p for name, p in objective.named_parameters() if p.requires_grad}
            if decay > 0
            else {}
        )
        self.tensors: dict[str, Tensor] = {
            name: torch.zeros_like(parameter) for name, parameter in trained.items()
        }
        self._pairs = [
            (local_part(self.tensors[name]), local_part(parameter))
            for name, parameter in trained.items()
        ]

    @torch.no_grad()
    def start(self) -> None:
        """Begin at the weights as they are."""
        for average, weight in self._pairs:
            average.copy_(weight)

    @torch.no_grad()
    def update(self) -> None:
        """Move by one step."""
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
        # A root that has computed without a backward still holds gathered weights: it must gather
        # again.
        self._objective.reshard()  # type: ignore[operator]  # FSDP's
        for average, weight in self._pairs:
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
